"""Runs the code cells of a notebook, or the Python blocks of a Markdown file, as one program.

    python run_code.py FILE [NAME=VALUE ...]

NAME=VALUE, a Python literal, replaces what the notebook's cell tagged `parameters` sets. Without Jupyter: its 30
packages would be installed for nothing else, and the cells hold plain Python.
"""

import ast
import json
import re
import sys
from pathlib import Path


def cells(path: Path) -> list[tuple[str, bool]]:
    """Returns the source of each cell, and whether it sets parameters."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [(block, False) for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    code = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    return [("".join(cell["source"]), "parameters" in cell["metadata"].get("tags", ())) for cell in code]


def main(path: Path, values: dict[str, object]) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for number, (source, sets_parameters) in enumerate(cells(path)):
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
        if sets_parameters:
            if unknown := values.keys() - names.keys():
                sys.exit(f"{path} has no parameter {', '.join(sorted(unknown))}")
            names |= values
    print(f"{path.name}: {number + 1} cells")


if __name__ == "__main__":
    given = (argument.partition("=") for argument in sys.argv[2:])
    main(Path(sys.argv[1]), {name: ast.literal_eval(value) for name, _, value in given})
