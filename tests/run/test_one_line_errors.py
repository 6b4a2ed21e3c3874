"""What an operating system refuses is one line that names the file, and status 2."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from mug.run.common.errors import in_one_line
from mug.run.common.output import lock


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "run/.lock"),
            "run/.lock: Permission denied; give this user",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free disk space"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"a\xff"), "a\udcff: No such file or directory"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a: b: Invalid cross-device link"),
        (ConnectionResetError("the other end\nis gone"), "the other end is gone"),
        (OSError(), "OSError()"),
    ],
)
def test_an_error_of_the_system_in_one_line(error, line):
    assert in_one_line(error).startswith(line)


LOCK = """
import sys
from pathlib import Path
from mug.run.common.console import run_command
from mug.run.common.output import lock
run_command(lambda console: lock(Path(sys.argv[1])))
"""
# Root that may not pass over the rights of files.
AS_ANOTHER_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_another_users_lock_is_one_line(tmp_path):
    lock(tmp_path)
    os.chown(tmp_path / ".lock", 65534, 65534)
    command = [*AS_ANOTHER_USER, sys.executable, "-c", LOCK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/.lock: Permission denied; give this user permission")
