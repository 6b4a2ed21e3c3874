"""Monitors which ranks are alive, and which one keeps the others waiting.

Apart from the connections that carry gradients, every rank keeps one to rank 0 and reports on it, every second, how
far it is. A process that is killed closes its connection at that moment; a machine that is gone, or a process that is
stopped, sends no heartbeat; one that hangs makes no progress while its heartbeats continue. Rank 0 names it to all the
others, and each of them ends, from a thread: its main thread may wait in a collective call for ever.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from mug.run.cluster import lost_ranks
from mug.run.cluster.launcher import LAUNCHER
from mug.run.common.console import Console, exit_now
from mug.run.common.errors import NO_PROGRESS, RESTART, is_communication_error

HEARTBEAT_SECONDS = 1.0  # seconds between two messages of a rank
HEARTBEAT_TIMEOUT = 40.0  # seconds without a message after which a rank counts as lost
SHUTDOWN_GRACE = 5.0  # seconds that ranks have to end by themselves, after one has failed
LONGEST = 1 << 16  # bytes of a message


class RankMonitor:
    """Watches over all ranks, from one thread of each, until the `with` block is left.

    All ranks make one at the same point of the program.
    """

    def __init__(self, console: Console, hang_seconds: float):
        self.console = console
        self.interval = min(HEARTBEAT_SECONDS, hang_seconds / 10)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.steps_made, self.place, self.left = 0, "starting", False
        self.losses: tuple[Path, lost_ranks.Losses] | None = None  # the run's folder, and those so far
        self.saved = self.reached = -1  # steps: of the newest checkpoint at the start, and the last one done
        self.server: threading.Thread | None = None
        listener = socket.create_server(("", 0), backlog=self.world) if self.rank == 0 else None
        address: list[Any] = [listener and (listener.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(address, src=0)
        port, token = address[0]
        if listener:
            server = MonitorServer(listener, token, self.world, hang_seconds)
            self.server = threading.Thread(target=server.run, daemon=True)
            self.server.start()
        self.line = JsonSocket(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=HEARTBEAT_TIMEOUT))
        self.line.send({"token": token, "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()})
        dist.barrier()  # so that no rank can be lost before the server knows its name
        threading.Thread(target=self._listen, daemon=True).start()

    def progress(self, place: str) -> None:
        """Record progress: this rank is now at `place`."""
        self.place = place
        self.steps_made += 1

    def count_losses(self, output: Path, losses: lost_ranks.Losses, saved: int) -> None:
        """From here on, exit with status 3 if one more loss would be the third in a row without progress.

        Args:
            output: the run's folder, which keeps count.
            losses: its count, the same on all ranks.
            saved: step of the newest checkpoint, 0 without one.
        """
        self.losses, self.saved, self.reached = (output, losses), saved, saved

    def __enter__(self) -> "RankMonitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_communication_error(error):
            # Another rank is gone. The server knows which one, and the thread will end this process with its name.
            time.sleep(HEARTBEAT_TIMEOUT + 10 * HEARTBEAT_SECONDS)
        self.left = True
        reason = None if error is None else f"{kind.__name__}: {error}".splitlines()[0]
        self.line.send({"left": True, "reason": reason})
        if self.server:
            self.server.join(
                SHUTDOWN_GRACE + 5 * HEARTBEAT_SECONDS
            )  # the others must not take this process's exit for a loss

    def _listen(self) -> None:
        """Send heartbeats and listen until this rank leaves, or the server reports a lost rank, or is lost itself."""
        last_heard, last_sent, launcher_is_gone = time.monotonic(), float("-inf"), False
        while not self.left:
            if time.monotonic() >= last_sent + self.interval:
                last_sent = time.monotonic()
                self.line.send({"progress": self.steps_made, "place": self.place, "waits": _waits_for_others()})
                if not launcher_is_gone and LAUNCHER.is_gone():
                    launcher_is_gone = True
                    self._ask_to_end()
            messages = self.line.receive(max(0.0, last_sent + self.interval - time.monotonic()))  # answers come at once
            if self.left:
                return
            if messages is None:
                self._end("rank 0 is lost: its process ended")
            elif messages:
                last_heard = time.monotonic()
            elif time.monotonic() - last_heard > HEARTBEAT_TIMEOUT:
                self._end(f"no heartbeat from rank 0 for {HEARTBEAT_TIMEOUT:.0f} s")
            for message in messages or ():
                if message.get("dump"):
                    faulthandler.dump_traceback(sys.stderr.fileno(), all_threads=True)
                if "warning" in message and self.rank == 0:
                    self.console.warn(message["warning"])
                if "end" in message:
                    self._end(message["end"], message["status"], reports=self.rank == 0)

    def _ask_to_end(self) -> None:
        """End as on preemption by a scheduler: all ranks save and end; before training, they just end."""
        self.console.warn("the launcher is gone: saving the run and ending it")
        print("the launcher of this rank is gone", file=sys.stderr)  # into the log
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, line: str, status: int = RESTART, reports: bool | None = None) -> NoReturn:
        """End this process. Where rank 0 is lost and cannot report, the first rank of each machine does."""
        if status == RESTART:
            reports = int(os.environ["LOCAL_RANK"]) <= 1 if reports is None else reports
            status, remedy = self._count_loss(keep=reports)
            line += f"; {remedy}"
            if reports:
                self.console.close()
                self.console.error(f"error: {line}")
        print(line, file=sys.stderr)  # into the log
        exit_now(status)

    def _count_loss(self, keep: bool) -> tuple[int, str]:
        """Returns the exit status after a loss, and what to do."""
        if self.losses:
            output, before = self.losses
            losses = before.another(self.saved, self.reached)
            if keep:
                lost_ranks.write(output, losses)
            if losses.in_a_row >= lost_ranks.LIMIT:
                return NO_PROGRESS, (
                    f"the run has ended like this {losses.in_a_row} times in a row, never beyond step {losses.reached}:"
                    " see logs/rank*.log before restarting it"
                )
        return RESTART, "rerun the same command to resume from the newest checkpoint"


def _waits_for_others() -> bool:
    """Whether a thread of this process is in a collective call."""
    return any(
        "distributed_c10d" in (file := frame.f_code.co_filename) or "deepspeed/comm" in file
        for top in sys._current_frames().values()
        for frame in _frames(top)
    )


def _frames(frame: Any) -> Iterable[Any]:
    while frame:
        yield frame
        frame = frame.f_back


class JsonSocket:
    """A connection on which each line is a JSON object."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.connection.settimeout(HEARTBEAT_TIMEOUT)
        self.rest = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send, if the other end still exists; if it does not, `receive` reports it."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]] | None:
        """Returns the messages received, after waiting up to `seconds` for one; None if the other end is gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            if not selector.select(seconds):
                return []
        try:
            data = self.connection.recv(LONGEST)
        except OSError:
            data = b""
        *lines, self.rest = (self.rest + data).split(b"\n")
        if not data or len(self.rest) > LONGEST:
            return None
        return [json.loads(line) for line in lines]


@dataclass
class RankStatus:
    """The state of a rank, as the server knows it."""

    rank: int
    host: str
    pid: int
    line: JsonSocket
    last_heard: float
    advanced: float  # time of its last progress
    progress: int = -1
    place: str = "starting"
    waits: bool = False
    left: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}, {self.place})"


class MonitorServer:
    """Rank 0's server of the monitor, in a thread of its own, which ends with the last rank."""

    def __init__(self, listener: socket.socket, token: str, world: int, hang_seconds: float):
        self.listener, self.token, self.world = listener, token, world
        self.hang_seconds = hang_seconds
        self.members: dict[int, RankStatus] = {}
        self.failed: tuple[float, str] | None = None  # when a rank left with an error, and which one
        self.warned: set[int] = set()  # progress at which a rank was reported late

    def run(self) -> None:
        with self.listener:
            while len(self.members) < self.world:
                self._admit(*self.listener.accept())
        while not all(member.left for member in self.members.values()):
            self._poll()
            self._check_timeouts(time.monotonic())

    def _admit(self, connection: socket.socket, address: object) -> None:
        """Accept a connection; one that does not know the token is closed, as it is not of this run."""
        line, now = JsonSocket(connection), time.monotonic()
        try:
            hello = (line.receive(HEARTBEAT_TIMEOUT) or [{}])[0]
        except ValueError:
            hello = {}
        if hello.get("token") != self.token:
            connection.close()
            return
        self.members[hello["rank"]] = RankStatus(hello["rank"], hello["host"], hello["pid"], line, now, now)

    def _poll(self) -> None:
        """Wait a second for messages, and answer each."""
        with selectors.DefaultSelector() as selector:
            for member in self.members.values():
                if not member.left:
                    selector.register(member.line.connection, selectors.EVENT_READ, member)
            ready = [key.data for key, _ in selector.select(1.0)]
        for member in ready:
            messages = member.line.receive()
            if messages is None:
                self._end(f"{member} is lost: its process ended")
                member.left = True
            for message in messages or ():
                self._note(member, message, time.monotonic())

    def _note(self, member: RankStatus, message: dict[str, Any], now: float) -> None:
        member.last_heard = now
        if message.get("left"):
            member.left = True
            if message["reason"] and not self.failed:
                self.failed = now, f"{member} has stopped: {message['reason']}"
            return
        if message["progress"] != member.progress:
            member.advanced = now
        member.progress, member.place, member.waits = message["progress"], message["place"], message["waits"]
        member.line.send({})

    def _check_timeouts(self, now: float) -> None:
        """Find ranks that are silent, late or hung."""
        present = [member for member in self.members.values() if not member.left]
        if self.failed and now - self.failed[0] > SHUTDOWN_GRACE:
            self._end(self.failed[1], status=1)
        for member in present:
            if now - member.last_heard > HEARTBEAT_TIMEOUT:
                self._end(f"no heartbeat from {member} for {HEARTBEAT_TIMEOUT:.0f} s")
                return
        if not present:
            return
        last = min(member.progress for member in present)
        late = [member for member in present if member.progress == last]
        seconds = now - max(member.advanced for member in late)
        late = [member for member in late if not member.waits] or late
        who = ", ".join(map(str, late[:3])) + (f" and {len(late) - 3} more" if len(late) > 3 else "")
        where = "; stack traces in logs/rank*.log"
        if seconds > self.hang_seconds:
            self._broadcast({"dump": True})
            self._end(f"{who} made no progress for {seconds:.0f} s{where}")
        elif seconds > self.hang_seconds / 5 and last not in self.warned:
            self.warned.add(last)
            self._broadcast({"dump": True})
            self._broadcast({"warning": f"{who} made no progress for {seconds:.0f} s{where}"})

    def _end(self, line: str, status: int = RESTART) -> None:
        self._broadcast({"end": line, "status": status})

    def _broadcast(self, message: dict[str, Any]) -> None:
        """Send to all ranks, to rank 0 last: the message may end its process, and this thread with it."""
        for member in sorted(self.members.values(), key=lambda member: -member.rank):
            if not member.left:
                member.line.send(message)
