"""Runs commands to their end without importing PyTorch and the rest again for each, which costs seconds.

They are forks of one process that has imported the same modules. All else is as of a new one: file descriptors,
environment, signals, the script as `__main__`, its exit status. What Python or a module reads from the environment when
it is imported (PYTHONPATH, MUG_COMPILE_BACKEND, ...) needs subprocess.run.
"""

import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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
    return _fork(command, [environment])


def run_on_ranks(ranks: int, port: str, *command: object, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Python script of the project on several ranks, in ROOT, with the environment that torchrun gives them.

    Returns the first exit status other than 0, upon which the other ranks are terminated, and what all printed.
    """
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks))
    return _fork(list(map(str, command)), [{**env, **world, **place} for place in places])


def _fork(command: list[str], environments: list[dict[str, str]]) -> subprocess.CompletedProcess[str]:
    """Returns how the command ended in a fork for each environment, and what they printed."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as errors:
        server, job = _server(), {"command": command, "environments": environments, "files": [out.name, errors.name]}
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
        script = next(word for word in job["command"] if word.startswith("run/"))
        importlib.import_module("mug." + script.removesuffix(".py").replace("/", "."))
        sys.stdout.flush()
        children = set()
        for environment in job.pop("environments"):
            if (child := os.fork()) == 0:
                statuses.close()
                _become(**job, environment=environment)
                return
            children.add(child)
        print(_wait(children), file=statuses, flush=True)
    sys.exit()


def _wait(children: set[int]) -> int:
    """Returns the first exit status other than 0, upon which the other children are terminated; 0 if there is none."""
    first = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for other in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGTERM)
    return first


def _become(command: list[str], environment: dict[str, str], files: list[str]) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate((os.devnull, *files)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv[:] = command
    sys.path[0] = str((ROOT / command[0]).parent)


if __name__ == "__main__":
    _serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
