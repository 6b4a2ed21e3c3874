"""Every read and write of text names its encoding: the locale's cannot hold what the project writes.

ruff's PLW1514 knows only the calls whose types it can infer.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("api", "data", "kernels", "model", "run") for path in (ROOT / folder).rglob("*.py")]
TEXT = {"read_text", "write_text"}
OPENING = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0, "SpooledTemporaryFile": 1}
RUNNING = {"run", "Popen", "check_output", "call", "check_call"}


def _says_binary(call: ast.Call, place: int) -> bool:
    """Whether the mode, at this place among the arguments or by name, is one of bytes; unknown modes are."""
    modes = [word.value for word in call.keywords if word.arg == "mode"] or call.args[place : place + 1]
    return bool(modes) and not (isinstance(modes[0], ast.Constant) and "b" not in str(modes[0].value))


def needs_encoding(call: ast.Call) -> bool:
    """Whether it reads or writes text in the locale's encoding."""
    names = {word.arg for word in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if "encoding" in names or None in names:
        return False
    if name in TEXT:
        return True
    if name in RUNNING:
        return bool({"text", "universal_newlines", "errors"} & names)
    if name not in OPENING or owner in ("Image", "tarfile", "PIL"):
        return False
    is_method = isinstance(call.func, ast.Attribute) and name == "open" and owner not in ("io", "builtins")
    if name.endswith("TemporaryFile") and not call.args and "mode" not in names:
        return False  # of bytes
    return not _says_binary(call, 0 if is_method else OPENING[name])


def calls(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='w')", True),
        ("path.open()", True),
        ("path.open('a', buffering=1)", True),
        ("path.open('rb+')", False),
        ("path.open(encoding='utf-8')", False),
        ("os.fdopen(1, 'w')", True),
        ("path.read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command)", False),
        ("Image.open(path)", False),
        ("tempfile.TemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
    ],
)
def test_what_is_found(source, needs):
    assert [needs_encoding(call) for call in calls(source)] == [needs]


def test_every_text_names_its_encoding():
    left = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}"
        for path in SOURCES
        for call in calls(path.read_text(encoding="utf-8"))
        if needs_encoding(call)
    ]
    assert not left, "\n".join(left)
