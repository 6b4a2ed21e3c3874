"""Counts the type errors of each folder by pyrefly, and fails where there are more than .ci/type_errors.json holds.

These numbers may only fall: after fixing some, `python .ci/check_types.py --update` writes the lower ones.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = Path(__file__).with_name("type_errors.json")
FOLDERS = ("api", "data", "kernels", "model", "run")


def link_package() -> None:
    """Make build/types/mug, the folders under their names as packages: pyrefly knows no import hooks."""
    package = ROOT / "build" / "types" / "mug"
    package.mkdir(parents=True, exist_ok=True)
    for folder in (*FOLDERS, "ds_configs"):
        if not (package / folder).is_symlink():
            (package / folder).symlink_to(ROOT / folder)


def type_errors() -> list[dict]:
    """The errors pyrefly finds, as its JSON has them: path, line, name, concise_description."""
    command = [Path(sys.executable).with_name("pyrefly"), "check", "--output-format", "json"]
    done = subprocess.run(
        [*command, "--python-interpreter-path", sys.executable], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        sys.exit(done.stderr)
    return [error for error in json.loads(done.stdout)["errors"] if error["severity"] == "error"]


def main(update: bool) -> int:
    link_package()
    errors = type_errors()
    allowed = json.loads(ALLOWED.read_text(encoding="utf-8"))
    found = {folder: [e for e in errors if Path(e["path"]).parts[0] == folder] for folder in FOLDERS}
    fewer = {folder: min(len(found[folder]), allowed[folder]) for folder in FOLDERS}
    if update:
        ALLOWED.write_text(json.dumps(fewer, indent=4) + "\n", encoding="utf-8")
    elif fewer != allowed:
        print("fewer type errors than allowed: run `python .ci/check_types.py --update` and commit the new numbers")
    worse = [folder for folder in FOLDERS if len(found[folder]) > allowed[folder]]
    for folder in worse:
        for error in found[folder]:
            print(f"{error['path']}:{error['line']}: {error['concise_description']} [{error['name']}]")
        print(f"{folder}/: {len(found[folder])} type errors, {allowed[folder]} allowed")
    return 1 if worse or (fewer != allowed and not update) else 0


if __name__ == "__main__":
    sys.exit(main("--update" in sys.argv[1:]))
