"""Records the rows of a benchmark as they are measured."""

import json
from typing import Any


class Record:
    """Rows, each written to the file before the next one is measured, so that a killed run keeps them."""

    def __init__(self, path: str | None):
        self.rows: list[dict[str, Any]] = []
        self._file = open(path, "w", encoding="utf-8", buffering=1) if path else None  # noqa: SIM115  open as long as the run

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._file:
            self._file.write(json.dumps(row) + "\n")
