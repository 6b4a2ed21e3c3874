"""Imported at the start by every Python that has this folder on PYTHONPATH: SIGKILL just before a file operation.

$CHAOS_AT is a regular expression; it is searched for in the audit event's name and paths, as in
`os.rename /run/checkpoint-3.partial /run/checkpoint-3`.
"""

import os
import re
import signal
import sys

EVENTS = {"open", "os.rename", "os.remove", "shutil.rmtree"}


def die_there(event: str, arguments: tuple) -> None:
    if event in EVENTS and place.search(" ".join([event, *map(str, arguments[:2])])):
        os.kill(os.getpid(), signal.SIGKILL)


if "CHAOS_AT" in os.environ:
    place = re.compile(os.environ["CHAOS_AT"])
    sys.addaudithook(die_there)
