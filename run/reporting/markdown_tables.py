"""Tables in a Markdown file that several commands write into, a section each."""

import re
import statistics
from pathlib import Path

from mug.run.common.output import write_whole


def spread(values: list[float]) -> str:
    """Returns shares as percent: mean ± standard deviation (n - 1), or the one value."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(path: Path, heading: str, text: str) -> None:
    """Put `text` under the heading `## HEADING` of a file, in the place of what stood there; else at its end."""
    before = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    fresh = f"## {heading}\n\n{text}\n"
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    after, found = pattern.subn(lambda _: f"{fresh}\n", before)
    after = after if found else f"{before.rstrip()}\n\n{fresh}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{after.rstrip()}\n")
