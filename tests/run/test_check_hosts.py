"""A hostfile whose hosts answer, do not, or are other machines; `ssh` is a script that knows four names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_script

from mug.run import check_hosts
from mug.run.common.errors import RunError

ROOT = Path(__file__).parents[2]
# The last but one argument is the host, the last one what it is to run.
SSH = """#!/bin/sh
for command; do host=$last; last=$command; done
case "$host" in
    alike) PATH="$0.d:$PATH" exec sh -c "$command" ;;
    other) exec sh -c "cd /nowhere-at-all" ;;
    broken) echo "Warning: something" >&2; echo "Permission denied (publickey)." >&2; exit 255 ;;
    *) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
esac
"""


@pytest.fixture
def programs(tmp_path):
    """A folder of programs: this machine's, but for ssh, pdsh and hostname."""
    folder = tmp_path / "bin"
    (folder / "ssh.d").mkdir(parents=True)
    scripts = {"ssh": SSH, "pdsh": "#!/bin/sh\n", "ssh.d/hostname": "#!/bin/sh\necho 10.0.0.1 172.17.0.1 for $1\n"}
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def start(hostfile: Path, path: str) -> subprocess.CompletedProcess:
    return run_script("run/check_hosts.py", hostfile, env={**os.environ, "PATH": path})


def test_a_line_for_each_host_and_a_verdict(tmp_path, programs):
    (tmp_path / "hosts").write_text("gone slots=8\n# a comment\n\nalike slots=8\nother slots=8\nbroken  slots=4\n")
    done = start(tmp_path / "hosts", f"{programs}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (1, "")
    gone, alike, other, broken, verdict = done.stdout.splitlines()
    assert gone == "gone: ssh: Could not resolve hostname gone: Name or service not known"
    assert alike == "alike: ok, at 10.0.0.1 172.17.0.1 for -I"
    assert other.startswith("other: ") and "/nowhere-at-all" in other
    assert broken == "broken: Permission denied (publickey)."
    assert verdict == "NOT ready: gone, other, broken"


def test_ready(tmp_path, programs):
    (tmp_path / "hosts").write_text("alike slots=8\n")
    done = start(tmp_path / "hosts", f"{programs}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "ready: 1 host(s)"


def test_pdsh_is_missing(tmp_path, programs):
    (tmp_path / "hosts").write_text("alike slots=8\n")
    (programs / "pdsh").unlink()
    done = start(tmp_path / "hosts", str(programs))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: pdsh is not installed here") and len(done.stderr.splitlines()) == 1


def test_the_folder_and_the_python_must_be_there(programs, monkeypatch):
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert check_hosts.ask("alike")[0] is None
    monkeypatch.setattr(sys, "executable", "/no such/python")
    assert "/no such/python" in check_hosts.ask("alike")[0]


def test_an_answer_is_not_waited_for_for_ever(programs, monkeypatch):
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (programs / "ssh").write_text("#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setattr(check_hosts, "CONNECT_SECONDS", 0.1)
    assert check_hosts.ask("alike")[0].startswith("ssh does not answer within 0.3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("", "does not name a host"),
        ("# node1 slots=8\n", "does not name a host"),
        ("node1 slots=8\nnode2\n", "line 2: 'node2' is not NAME slots=RANKS"),
        ("node1 slots=8\n\nnode1 slots=4\n", "line 3: node1 is named twice"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, says):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(RunError, match=says) as refused:
        check_hosts.read_hostfile(tmp_path / "hosts")
    assert "\n" not in str(refused.value) and str(tmp_path / "hosts") in str(refused.value)
