#!/usr/bin/env python3
"""Check that every host of a hostfile can be reached, in the way in which `deepspeed --hostfile` will: a line a host.

    python run/check_hosts.py hosts

from the machine, the folder and the environment that the run will be started in. Status 0: ready; 1: a host cannot be
used; 2: the file itself is wrong, or a program is missing here. run/preflight.py then checks the hosts themselves.
"""

import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jsonargparse import Namespace

from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError

CONNECT_SECONDS = 10
AT_ONCE = 32
SSH = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]


def main(console: Console) -> None:
    hosts = read_hostfile(parse().hostfile)
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise RunError(
                f"{program} is not installed here, and deepspeed --hostfile starts the hosts with it; install it, or"
                " start each host by itself (docs/cluster.md)"
            )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    for host, (problem, addresses) in answers.items():
        console.info(f"{host}: {problem or f'ok, at {addresses}'}")
    if failed := [host for host, (problem, _) in answers.items() if problem]:
        console.info(f"NOT ready: {', '.join(failed)}")
        raise SystemExit(1)
    console.info(f"ready: {len(hosts)} host(s)")


def parse() -> Namespace:
    parser = Parser(prog="check_hosts.py", description=__doc__.splitlines()[0])
    parser.add_argument("hostfile", type=Path, help="a line a host: NAME slots=RANKS")
    return parser.parse_args()


def read_hostfile(path: Path) -> list[str]:
    """Returns the hosts' names, in order. DeepSpeed reads the file alike, but ends in a traceback.

    Raises:
        RunError: it cannot be read, names no host, or one twice; or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}); give a file with a line per host: NAME slots=RANKS") from None
    hosts: list[str] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not (match := re.match(r"(\S+)\s+slots=\d+", line)):
            raise RunError(f"{path}, line {number}: {line!r} is not NAME slots=RANKS")
        if match[1] in hosts:
            raise RunError(f"{path}, line {number}: {match[1]} is named twice; give it one line with all its slots")
        hosts.append(match[1])
    if not hosts:
        raise RunError(f"{path} does not name a host; give it a line per host: NAME slots=RANKS")
    return hosts


def ask(host: str) -> tuple[str | None, str]:
    """Returns what is wrong with a host, if something is; and its addresses.

    This folder and this Python must exist there, and addresses: DeepSpeed gives the first host's first one to all ranks
    as the rendezvous.
    """
    there = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.quote(sys.executable)} -c '' && hostname -I"
    command = [*SSH, "--", host, there]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=3 * CONNECT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"ssh does not answer within {3 * CONNECT_SECONDS} s", ""
    if done.returncode:
        errors = done.stderr.strip().splitlines()
        return errors[-1] if errors else f"ssh ended with status {done.returncode}", ""
    return None if done.stdout.strip() else "hostname -I does not print an address", done.stdout.strip()


if __name__ == "__main__":
    run_command(main)
