"""Which ranks are alive, and which one keeps the others waiting.

Apart from the connections that carry gradients, every rank keeps one to rank 0 and says on it, every second, how far
it is. A process that is killed closes its connection at that moment; a machine that is gone, or a process that is
stopped, falls silent; one that hangs gets no further while it goes on talking. Rank 0 names it to all the others, and
each of them ends, from a thread: its main thread may wait in a collective call for ever.
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
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from mug.run.training.console import Console, leave
from mug.run.training.errors import RESTART, is_of_communication
from mug.run.training.launcher import LAUNCHER

BEAT = 1.0  # seconds between two messages of a rank
SILENCE = 40.0  # seconds without a message after which a rank is given up
GRACE = 5.0  # seconds that ranks have to end by themselves, after one has failed
LONGEST = 1 << 16  # bytes of a message


class Watch:
    """Watches over all ranks, from one thread of each, until the `with` block is left.

    All ranks make one at the same point of the program.
    """

    def __init__(self, console: Console, hang_seconds: float):
        self.console = console
        self.beat = min(BEAT, hang_seconds / 10)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.progress, self.place, self.left = 0, "starting", False
        self.board: threading.Thread | None = None
        listener = socket.create_server(("", 0), backlog=self.world) if self.rank == 0 else None
        meeting: list[Any] = [listener and (listener.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(meeting, src=0)
        port, token = meeting[0]
        if listener:
            board = Board(listener, token, self.world, hang_seconds)
            self.board = threading.Thread(target=board.run, daemon=True)
            self.board.start()
        self.line = Line(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=SILENCE))
        self.line.send({"token": token, "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()})
        dist.barrier()  # so that no rank can be lost before the board knows its name
        threading.Thread(target=self._listen, daemon=True).start()

    def at(self, place: str) -> None:
        """This rank has got further: it is now at `place`."""
        self.place = place
        self.progress += 1

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_of_communication(error):
            # Another rank is gone. The board knows which one, and the thread will end this process with its name.
            time.sleep(SILENCE + 10 * BEAT)
        self.left = True
        reason = None if error is None else f"{kind.__name__}: {error}".splitlines()[0]
        self.line.send({"left": True, "reason": reason})
        if self.board:
            self.board.join(GRACE + 5 * BEAT)  # the others must not take the end of this process for a loss

    def _listen(self) -> None:
        """Speak and listen until this rank leaves, or the board says who is lost, or is lost itself."""
        heard, spoken, launcher_is_gone = time.monotonic(), float("-inf"), False
        while not self.left:
            if time.monotonic() >= spoken + self.beat:
                spoken = time.monotonic()
                self.line.send({"progress": self.progress, "place": self.place, "waits": _waits_for_others()})
                if not launcher_is_gone and LAUNCHER.is_gone():
                    launcher_is_gone = True
                    self._ask_to_end()
            messages = self.line.receive(max(0.0, spoken + self.beat - time.monotonic()))  # answers come at once
            if self.left:
                return
            if messages is None:
                self._end("rank 0 is gone: its process ended")
            elif messages:
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                self._end(f"nothing was heard of rank 0 for {SILENCE:.0f} s")
            for message in messages or ():
                if message.get("dump"):
                    faulthandler.dump_traceback(sys.stderr.fileno(), all_threads=True)
                if "warning" in message and self.rank == 0:
                    self.console.warn(message["warning"])
                if "end" in message:
                    self._end(message["end"], message["status"], speaks=self.rank == 0)

    def _ask_to_end(self) -> None:
        """As a launcher or a scheduler does: all ranks save and end; what has not begun to train just ends."""
        self.console.warn("the launcher is gone: the run is saved, and ends")
        print("the launcher of this rank is gone", file=sys.stderr)  # into the log
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, line: str, status: int = RESTART, speaks: bool | None = None) -> NoReturn:
        """End this process. Where rank 0 is gone and cannot say so, the first ranks of each machine do."""
        if status == RESTART:
            line += "; the same command goes on from the newest checkpoint"
            if int(os.environ["LOCAL_RANK"]) <= 1 if speaks is None else speaks:
                self.console.close()
                self.console.fail(f"error: {line}")
        print(line, file=sys.stderr)  # into the log
        leave(status)


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


class Line:
    """A connection on which each line is a JSON object."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.connection.settimeout(SILENCE)
        self.rest = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send, if there is still somebody to send to; that nobody is there, `receive` finds out."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]] | None:
        """The messages that have come, after waiting up to `seconds` for one; None if the other end is gone."""
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
class Member:
    """What the board knows of a rank."""

    rank: int
    host: str
    pid: int
    line: Line
    heard: float
    advanced: float  # when it last got further
    progress: int = -1
    place: str = "starting"
    waits: bool = False
    left: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}, {self.place})"


class Board:
    """Rank 0's view of all ranks. It has a thread of its own, which ends with the last of them."""

    def __init__(self, listener: socket.socket, token: str, world: int, hang_seconds: float):
        self.listener, self.token, self.world = listener, token, world
        self.hang_seconds = hang_seconds
        self.members: dict[int, Member] = {}
        self.failed: tuple[float, str] | None = None  # when a rank has left with an error, and which one
        self.warned: set[int] = set()  # progress at which somebody was said to be late

    def run(self) -> None:
        with self.listener:
            while len(self.members) < self.world:
                self._admit(*self.listener.accept())
        while not all(member.left for member in self.members.values()):
            self._hear()
            self._judge(time.monotonic())

    def _admit(self, connection: socket.socket, address: object) -> None:
        """Whoever does not know the token is none of ours."""
        line, now = Line(connection), time.monotonic()
        try:
            hello = (line.receive(SILENCE) or [{}])[0]
        except ValueError:
            hello = {}
        if hello.get("token") != self.token:
            connection.close()
            return
        self.members[hello["rank"]] = Member(hello["rank"], hello["host"], hello["pid"], line, now, now)

    def _hear(self) -> None:
        """Wait a second for messages, and answer each."""
        with selectors.DefaultSelector() as selector:
            for member in self.members.values():
                if not member.left:
                    selector.register(member.line.connection, selectors.EVENT_READ, member)
            ready = [key.data for key, _ in selector.select(1.0)]
        for member in ready:
            messages = member.line.receive()
            if messages is None:
                self._end(f"{member} is gone: its process ended")
                member.left = True
            for message in messages or ():
                self._note(member, message, time.monotonic())

    def _note(self, member: Member, message: dict[str, Any], now: float) -> None:
        member.heard = now
        if message.get("left"):
            member.left = True
            if message["reason"] and not self.failed:
                self.failed = now, f"{member} has stopped: {message['reason']}"
            return
        if message["progress"] != member.progress:
            member.advanced = now
        member.progress, member.place, member.waits = message["progress"], message["place"], message["waits"]
        member.line.send({})

    def _judge(self, now: float) -> None:
        """Find who is silent, late or hung."""
        present = [member for member in self.members.values() if not member.left]
        if self.failed and now - self.failed[0] > GRACE:
            self._end(self.failed[1], status=1)
        for member in present:
            if now - member.heard > SILENCE:
                self._end(f"nothing was heard of {member} for {SILENCE:.0f} s")
                return
        if not present:
            return
        last = min(member.progress for member in present)
        late = [member for member in present if member.progress == last]
        seconds = now - max(member.advanced for member in late)
        late = [member for member in late if not member.waits] or late
        who = ", ".join(map(str, late[:3])) + (f" and {len(late) - 3} more" if len(late) > 3 else "")
        where = "; where each rank is: logs/rank*.log"
        if seconds > self.hang_seconds:
            self._tell({"dump": True})
            self._end(f"{who} got no further for {seconds:.0f} s{where}")
        elif seconds > self.hang_seconds / 5 and last not in self.warned:
            self.warned.add(last)
            self._tell({"dump": True})
            self._tell({"warning": f"{who} got no further for {seconds:.0f} s{where}"})

    def _end(self, line: str, status: int = RESTART) -> None:
        self._tell({"end": line, "status": status})

    def _tell(self, message: dict[str, Any]) -> None:
        """Rank 0 hears it last: what it hears may end its process, and this thread with it."""
        for member in sorted(self.members.values(), key=lambda member: -member.rank):
            if not member.left:
                member.line.send(message)
