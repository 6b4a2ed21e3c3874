"""A command whose reader has gone away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEAKS = """
from mug.run.common.console import run_command
import signal, sys

def main(console):
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    sys.stdin.readline()
    for step in range(3):
        console.step(step, "a line that nobody reads")
        console.error("nor this one")
    open(sys.argv[1], "w").write(f"saved; asked {len(asked)} times")

run_command(main)
"""


def test_who_is_not_read_any_more_is_asked_to_end_once(tmp_path):
    """A run can then save what it has."""
    command = [sys.executable, "-c", SPEAKS, str(tmp_path / "said")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 0
    assert (tmp_path / "said").read_text() == "saved; asked 1 times"


FAILS = r"""
import sys
from mug.run.common.console import run_command
from mug.run.common.errors import RunError

def main(console):
    print("a library's ×")
    console.info("20 × 30, of " + sys.argv[1])
    raise RunError(sys.argv[1] + " is no 한 shard")

run_command(main)
"""


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "20 \\xd7 30, of bad\\udcff"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}, "20 × 30, of bad\\udcff"),
        ({"LC_ALL": "C.utf8"}, "20 × 30, of bad\\udcff"),
    ],
    ids=["C", "Latin-1", "UTF-8"],
)
def test_what_the_terminal_cannot_show_is_shown_escaped(tmp_path, variables, shown):
    """And what is no UTF-8 at all: a name of another system."""
    script = tmp_path / "script.py"
    script.write_text(FAILS, encoding="utf-8")
    command = [sys.executable, script, b"bad\xff"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.decode("latin-1" if "PYTHONIOENCODING" in variables else "utf-8") == shown + "\n"
    assert done.stderr.startswith(b"error: bad\\udcff is no ") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_nobodys(tmp_path, closed):
    """As cron and some launchers leave them: the status is the same, and files are not written into."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", FAILS, "shard"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ("" if ">&- " in f" {closed} ".replace("2>&-", "") else "20 × 30, of shard\n")
    assert done.stderr == ("" if "2>&-" in closed else "error: shard is no 한 shard\n")


SHOWS = """
import signal, sys
from pathlib import Path
from rich.table import Table
from mug.run.common.console import run_command
from mug.run.common.output import append_line

def main(console):
    sys.stdin.readline()
    console.show(Table("what nobody reads"))
    for number in range(3):
        console.info("nor a line")
    append_line(Path(sys.argv[1]), "the result")

run_command(main)
"""


def test_a_command_whose_reader_is_gone_still_leaves_its_results(tmp_path):
    """As `| head -1` does; rich would end the process at a table."""
    command = [sys.executable, "-c", SHOWS, str(tmp_path / "results")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 0 and process.stderr.read() == b""
    assert (tmp_path / "results").read_text() == "the result\n"


def test_help_that_nobody_reads_is_no_error(tmp_path):
    command = f"{sys.executable} run/report.py --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
