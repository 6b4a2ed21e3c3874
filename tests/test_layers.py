"""Imports run one way: api → run → model, data, kernels; model → kernels; inside run, each room on those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"kernels": (), "data": (), "model": ("kernels",), "run": ("model", "data", "kernels")}
MAY_IMPORT |= {"api": ("run", "model", "data", "kernels")}
# Inside run, from the ground up; a room imports those before it. Commands, run/NAME.py, stand above all.
ROOMS = (
    "common",
    "cluster",
    "state",
    "reporting",
    "evaluators",
    "training",
    "exporting",
    "benchmarks",
    "studies",
    "commands",
)


def imports(file: Path) -> set[str]:
    """The project's modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("mug.")}


def files(top: str) -> list[Path]:
    return sorted((ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("top", MAY_IMPORT)
def test_a_layer_imports_those_below_it(top):
    for file in files(top):
        for name in imports(file):
            assert name.split(".")[1] in (top, *MAY_IMPORT[top]), f"{file.relative_to(ROOT)} imports {name}"


def room(parts: tuple[str, ...]) -> str:
    """The room of a module of run, by its path below run."""
    return parts[0] if parts[0] in ROOMS else "commands"


def test_a_room_of_run_imports_those_below_it():
    for file in files("run"):
        ours = ROOMS.index(room(file.relative_to(ROOT / "run").parts))
        for name in imports(file):
            if name.startswith("mug.run."):
                theirs = ROOMS.index(room(tuple(name.split(".")[2:])))
                assert theirs <= ours, f"{file.relative_to(ROOT)} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    modules = {
        ".".join(("mug", *file.relative_to(ROOT).with_suffix("").parts)): file
        for top in MAY_IMPORT
        for file in files(top)
    }
    graph = {name: imports(file) & modules.keys() for name, file in modules.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
