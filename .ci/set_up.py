"""Checks that this machine can be set up, and sets it up: `make` calls it. Standard library only, Python 3.8 or later,
so that an old Python gets one line, too.

    python3 .ci/set_up.py check VENV                  # status 2 and one line where something is missing
    python3 .ci/set_up.py install VENV CONSTRAINTS    # the environment, by uv, or by pip where that does not work
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTED = ((3, 11), (3, 12))
DISK_GB = 8  # of the environment, with what is unpacked on the way
TEMPORARY_GB = 4  # of it, in the folder for temporary files
MEMORY_GB = 4  # of the demo's processes, or of two that test
# What the commands import when they need it.
LIBRARIES = "deepspeed, scipy.stats, sklearn.linear_model, timm, torch._dynamo, transformers"
# pip's settings that uv reads under other names.
FOR_UV = {
    "index-url": ("UV_DEFAULT_INDEX",),
    "extra-index-url": ("UV_INDEX",),
    "find-links": ("UV_FIND_LINKS",),
    "no-index": ("UV_NO_INDEX",),
    "trusted-host": ("UV_INSECURE_HOST",),
    "cert": ("SSL_CERT_FILE",),
    "proxy": ("HTTPS_PROXY", "HTTP_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
}


def problem(venv: Path) -> str | None:
    """Returns why `make demo` or `make test` would fail here, in one line; None if nothing is missing."""
    if not (venv / ".ready").is_file() and (missing := python_problem() or disk_problem(venv)):
        return missing
    free = memory_gb()
    if free is not None and free < MEMORY_GB:
        return f"{free:.1f} GB of memory and swap are free, {MEMORY_GB} are needed: end other programs, or add swap"
    return None


def python_problem(version: tuple = tuple(sys.version_info[:2])) -> str | None:
    if version < TESTED[0]:
        others = [name for name in (f"python3.{minor}" for _, minor in reversed(TESTED)) if shutil.which(name)]
        use = f"make PYTHON={others[0]}" if others else "install one, and make PYTHON=python3.12"
        return f"Python {version[0]}.{version[1]} is too old, 3.11 or 3.12 is needed: {use}"
    if version > TESTED[-1]:
        print(f"Python {version[0]}.{version[1]} has not been tested; 3.11 and 3.12 have (make PYTHON=python3.12)")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            return f"this Python has no module {module}: apt install python3-venv, or choose another by make PYTHON=..."
    return None


def disk_problem(venv: Path) -> str | None:
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    for folder, needed, remedy in (
        (venv.resolve().parent, DISK_GB, "free some, or work on another disk"),
        (temporary, TEMPORARY_GB, "free some, or set TMPDIR to a folder on another disk"),
    ):
        free = shutil.disk_usage(str(folder)).free / 1e9 if folder.is_dir() else needed
        if free < needed:
            return f"{folder} has {free:.1f} GB of free disk space, {needed} are needed: {remedy}"
    return None


def memory_gb(info: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float | None:
    """Returns the memory and swap that are free, at most the container's memory; None where it is unknown."""
    if not info.is_file():
        return None
    lines = (line.split() for line in info.read_text(encoding="utf-8").splitlines())
    values = {words[0]: int(words[1]) * 1024 / 1e9 for words in lines}
    free = values.get("MemAvailable:", values["MemFree:"]) + values.get("SwapFree:", 0)
    allowed = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return free if allowed == "max" else min(free, int(allowed) / 1e9)


# --- Installation -------------------------------------------------------------------------------------------


def install(venv: Path, constraints: str) -> None:
    """Make the environment, or bring it up to date: by uv, which is several times faster, or by pip."""
    say(1, f"virtual environment in {venv}")
    run([sys.executable, "-m", "venv", str(venv)])
    python = str(venv / "bin" / "python")
    os.environ["PIP_USER"] = "0"  # which does not work in an environment
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
    run([*pip, "--upgrade", "-c", constraints, "pip", "setuptools", "wheel"])
    uv = shutil.which("uv") or fetch_uv(venv, [*pip, "-c", constraints])
    commands = [[uv, "pip", "install", "-q", "--python", python]] if uv else []
    commands += [[*pip, "--no-compile"]]  # write_bytecode compiles what is needed; everything would take minutes
    if uv:
        found = uv_variables(pip_settings(python))
        os.environ.update({name: value for name, value in found.items() if name not in os.environ})
    say(2, "PyTorch, about 6 GB installed: up to 5 minutes")
    run(*([*command, "-c", constraints, "torch", "torchvision"] for command in commands))
    say(3, "DeepSpeed and the rest: up to 1 minute")
    run(*([*command, "-c", constraints, "-e", ".[test]"] for command in commands))
    say(4, "bytecode of what the commands import: up to half a minute")
    write_bytecode(python)


def write_bytecode(python: str) -> None:
    """Import the libraries once: uv writes no bytecode, and a process that may not write any compiles them again."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([python, "-c", f"import {LIBRARIES}"], env=environment, check=False, **silent)


def fetch_uv(venv: Path, pip: list) -> str | None:
    """Returns uv, installed in the environment; None where there is none for this machine."""
    if subprocess.run([*pip, "uv"], stderr=subprocess.DEVNULL).returncode:
        print("no uv could be fetched for this machine: pip takes some minutes more", flush=True)
        return None
    return str(venv / "bin" / "uv")


def pip_settings(python: str) -> dict:
    """Returns pip's settings by name, of its files and variables; those of `install` before the general ones."""
    listed = subprocess.run(
        [python, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, encoding="utf-8", check=True
    ).stdout
    settings = {}
    for section in ("global", "install", ":env:"):
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                settings[name[len(section) + 1 :]] = ast.literal_eval(value)
    return settings


def uv_variables(settings: dict) -> dict:
    """Returns the variables by which uv follows pip's settings."""
    found = {variable: settings[name] for name, names in FOR_UV.items() if name in settings for variable in names}
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = ",".join(found["UV_FIND_LINKS"].split())
    if "UV_INDEX" in found:
        # pip passes over a folder that is missing, and takes the best version of all indexes.
        places = [one for one in found["UV_INDEX"].split() if not one.startswith("file://") or Path(one[7:]).is_dir()]
        found["UV_INDEX"], found["UV_INDEX_STRATEGY"] = " ".join(places), "unsafe-best-match"
    return found


def say(step: int, what: str) -> None:
    print(f"[set-up {step}/4] {what}", flush=True)


def run(*commands: list) -> None:
    """Run the first of the commands that does not fail."""
    for number, command in enumerate(commands, 1):
        if not subprocess.run(command).returncode:
            return
        if number < len(commands):
            print(f"{command[0]} failed, as it says above: trying {' '.join(commands[number][:4])}", flush=True)
    sys.exit(
        f"set-up failed at: {' '.join(commands[-1])}; behind a proxy set HTTPS_PROXY, with a mirror PIP_INDEX_URL, and"
        " run make again"
    )


def main(arguments: list) -> None:
    venv = Path(arguments[1])
    if arguments[0] == "check":
        if (missing := problem(venv)) is not None:
            print(f"error: {missing}", file=sys.stderr)
            sys.exit(2)
    else:
        install(venv, arguments[2])


if __name__ == "__main__":
    main(sys.argv[1:])
