"""Runs commands to their end without importing PyTorch and the rest again for each, which costs seconds.

They are forks of one process that has imported the same modules. All else is as of a new one: file descriptors,
environment, signals, the script as `__main__`, its exit status. What Python or a module reads from the environment when
it is imported (PYTHONPATH, MUG_COMPILE_BACKEND, ...) needs subprocess.run.
"""

import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_started: set[str] = set()


def run_script(script: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python script of the project, in ROOT; returns its exit status and what it printed.

    The first call for a script starts it as a user does.
    """
    command, environment = [script, *map(str, arguments)], dict(os.environ if env is None else env)
    if script not in _started:
        _started.add(script)
        python = [sys.executable, *command]
        return subprocess.run(python, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as errors:
        server, job = _server(), {"command": command, "environment": environment, "files": [out.name, errors.name]}
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, out.read().decode(), errors.read().decode())


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")


def _serve() -> None:
    """Fork for each line of the standard input, a job in JSON, and print its exit status; returns in the forks."""
    statuses = open(os.dup(1), "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(2, 1)  # for what DeepSpeed prints when it is imported
    for line in sys.stdin:
        job = json.loads(line)
        importlib.import_module("mug." + job["command"][0].removesuffix(".py").replace("/", "."))
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            statuses.close()
            _become(**job)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=statuses, flush=True)
    sys.exit()


def _become(command: list[str], environment: dict[str, str], files: list[str]) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate((os.devnull, *files)):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv[:] = command
    sys.path[0] = str((ROOT / command[0]).parent)


if __name__ == "__main__":
    _serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
