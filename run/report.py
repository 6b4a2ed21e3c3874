#!/usr/bin/env python3
"""One page about one run or several: curves, throughput, transfer, reconstructions, captions, data, recipes.

    python run/report.py runs/compositions_tiny
    python run/report.py runs/first runs/second --out compared.html

The page is one HTML file that needs no network. Runs are drawn side by side, by step, or by samples seen where their
global batches differ; pre-training, fine-tuning and segmentation runs alike. Transfer results are those that kNN, the
linear probe and the others wrote into the run's folder (--json RUN/results.jsonl).
"""

from pathlib import Path

from jsonargparse import Namespace

from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.output import check_writable_file, write_whole
from mug.run.reporting import sections
from mug.run.reporting.runs import open_runs


def main(console: Console) -> None:
    options = parse()
    runs = open_runs(options.runs)
    out = Path(options.out)
    title = f"MUG: {', '.join(run.name for run in runs)}"
    write_whole(out, sections.build(title, runs, console.warn))
    console.info(f"{out}: {len(runs)} run(s), {out.stat().st_size / 1e6:.2f} MB")


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag, no run, or a page that cannot be written.
    """
    parser = Parser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=str, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=str, default="report.html", help="the page")
    options = parser.parse_args(arguments)
    check_writable_file(Path(options.out), "--out")
    return options


if __name__ == "__main__":
    run_command(main)
