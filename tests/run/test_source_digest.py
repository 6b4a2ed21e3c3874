"""Which code runs when a script of one checkout is started with another one installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A second one, as a user has next to the installed one."""
    for name in ("data", "kernels", "model", "run"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def start(checkout: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, checkout / "run" / "check_hosts.py", "no such file"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_script_whose_code_does_not_run_says_so(checkout):
    """The same code at another place is fine."""
    assert start(checkout).stdout == ""
    with (checkout / "data" / "captions.py").open("a") as file:
        file.write("# changed\n")
    done = start(checkout)
    assert done.stdout.startswith(
        f"warning: {checkout}/run/check_hosts.py belongs to the checkout {checkout}, but the code"
    )
    assert str(ROOT.resolve()) in done.stdout and "pip install -e" in done.stdout
    assert done.returncode == 2


def test_a_script_of_the_users_own_is_left_alone(tmp_path):
    script = tmp_path / "run" / "mine.py"
    script.parent.mkdir()
    script.write_text(
        "from mug.run.common.console import run_command\nrun_command(lambda console: console.info('ran'))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran\n")
