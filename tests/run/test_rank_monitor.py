"""A rank that is killed, stopped, stuck or broken is named, and the others end."""

import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mug.run.cluster import lost_ranks
from mug.run.cluster import rank_monitor as watch
from mug.run.cluster.rank_monitor import MonitorServer, RankMonitor, RankStatus
from mug.run.common import rank_env as places

WORLD = 3
RESTART = 75


class Terminal:
    """What the watch needs of a console; a file instead of a terminal."""

    def __init__(self, path: Path):
        self.path = path

    def error(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")

    def close(self) -> None:
        pass

    def warn(self, line: str) -> None:
        self.error(f"warning: {line}")


def train_for_ever(rank: int, guard: RankMonitor) -> None:
    while True:
        guard.progress("step 7")
        dist.barrier()
        time.sleep(0.01)


def be_killed(rank: int, guard: RankMonitor) -> None:
    if rank == 1:
        guard.progress("step 7, its data")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    train_for_ever(rank, guard)


def be_killed_as_rank_zero(rank: int, guard: RankMonitor) -> None:
    be_killed(1 - rank if rank < 2 else rank, guard)


def be_stopped(rank: int, guard: RankMonitor) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    train_for_ever(rank, guard)


def be_stuck(rank: int, guard: RankMonitor) -> None:
    guard.progress("step 7")
    if rank == 2:
        time.sleep(1000)
    train_for_ever(rank, guard)


def be_late(rank: int, guard: RankMonitor) -> None:
    guard.progress("step 7")
    if rank == 2:
        time.sleep(8)
    dist.barrier()


def lose_its_launcher(rank: int, guard: RankMonitor) -> None:
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    # Blocked where another test's data loader has started the fork server.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if rank == 1:
        watch.LAUNCHER.is_gone = lambda: True
    deadline = time.monotonic() + (20 if rank == 1 else 1)
    while not asked and time.monotonic() < deadline:
        time.sleep(0.1)
    dist.barrier()
    time.sleep(1)  # ten heartbeats
    guard.console.error(f"rank {rank} was asked {len(asked)} times")


def raise_an_error(rank: int, guard: RankMonitor) -> None:
    if rank == 1:
        raise KeyError("of rank 1")
    train_for_ever(rank, guard)


def end(rank: int, guard: RankMonitor) -> None:
    guard.progress("step 7")
    time.sleep(0.3 * rank)


def count_messages(rank, guard: RankMonitor) -> None:
    """For a second, into the log."""
    sent, send = [], guard.line.send
    guard.line.send = lambda message: (sent.append(message), send(message))
    time.sleep(1)
    guard.line.send = send
    print(f"{len(sent)} messages", file=sys.stderr)


def live(rank: int, port: int, folder: Path, act, hang_seconds: float) -> None:
    watch.HEARTBEAT_SECONDS, watch.HEARTBEAT_TIMEOUT, watch.SHUTDOWN_GRACE = 0.1, 10.0, 0.5
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank)}
    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    with RankMonitor(Terminal(folder / "terminal"), hang_seconds) as guard:
        act(rank, guard)
    time.sleep(0.3 * rank)  # the last to go must not miss the first
    os._exit(0)


def run(folder: Path, act, hang_seconds: float = 60.0) -> tuple[list[int | None], list[int], list[str]]:
    """Exit codes (None: still there after 20 s) and process ids by rank, and the lines on the terminal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([watch.__name__])
    port = places.free_port()
    ranks = [context.Process(target=live, args=(rank, port, folder, act, hang_seconds)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()) if act is not be_stopped or process is not ranks[2] else 0)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    terminal = folder / "terminal"
    return codes, [process.pid for process in ranks], terminal.read_text().splitlines() if terminal.exists() else []


def test_ranks_that_end_are_not_missed(tmp_path):
    assert run(tmp_path, end)[::2] == ([0, 0, 0], [])


def test_a_rank_reports_once_an_interval(tmp_path):
    """Answers come at once, and must not make it report again."""
    assert run(tmp_path, count_messages)[0] == [0, 0, 0]
    for rank in range(WORLD):
        count = int(re.search(r"(\d+) messages", (tmp_path / f"rank{rank}.log").read_text())[1])
        assert 1 <= count <= 11  # the interval is 0.1 s here


@pytest.mark.parametrize(
    ("act", "codes", "says"),
    [
        (
            be_killed,
            [75, -9, 75],
            r"error: rank 1 \(host \S+, pid PID1, step 7, its data\) is lost: its process ended; .*",
        ),
        (be_killed_as_rank_zero, [-9, 75, 75], "error: rank 0 is lost: its process ended; .*"),
        (be_stopped, [75, 75, None], r"error: no heartbeat from rank 2 \(host \S+, pid PID2, .*\) for 10 s; .*"),
    ],
)
def test_a_lost_rank_is_named_once_and_the_others_end(tmp_path, act, codes, says):
    ended, pids, lines = run(tmp_path, act)
    assert ended == codes
    for rank, pid in enumerate(pids):
        says = says.replace(f"PID{rank}", str(pid))
    assert len(lines) == 1 and re.fullmatch(says, lines[0]), lines
    for rank in (rank for rank, code in enumerate(codes) if code == RESTART):
        assert lines[0].removeprefix("error: ") in (tmp_path / f"rank{rank}.log").read_text()


def be_killed_again(rank: int, guard: RankMonitor) -> None:
    """After a step beyond the checkpoint of step 4; the terminal's folder is the run's, too."""
    output = guard.console.path.parent
    guard.count_losses(output, lost_ranks.read(output), saved=4)
    dist.barrier()  # all have read
    guard.reached = 5
    be_killed(rank, guard)


def be_killed_again_as_rank_zero(rank: int, guard: RankMonitor) -> None:
    be_killed_again(1 - rank if rank < 2 else rank, guard)


def test_a_rank_that_dies_the_same_way_each_time_ends_the_restarts(tmp_path):
    """Whichever it is; the third time in a row, and the fourth."""
    acts = be_killed_again, be_killed_again_as_rank_zero, be_killed_again, be_killed_again
    for act, status in zip(acts, (75, 75, 3, 3), strict=True):
        (tmp_path / "terminal").unlink(missing_ok=True)
        codes, _, lines = run(tmp_path, act)
        assert sorted(codes) == [-9, status, status]
    assert len(lines) == 1 and re.fullmatch(
        r"error: rank 1 .* is lost: its process ended; the run has ended like this 4 times in a row, never beyond step"
        r" 5: see logs/rank\*\.log before restarting it",
        lines[0],
    )


def test_losses_are_in_a_row_as_long_as_nothing_is_saved_or_done_that_was_not_before(tmp_path):
    losses, rows = lost_ranks.read(tmp_path / "run"), []
    for saved, reached in ((0, 0), (0, 0), (0, 3), (0, 3), (0, 2), (2, 3), (2, 2), (2, 4)):
        losses = losses.another(saved, reached)
        lost_ranks.write(tmp_path / "run", losses)
        assert lost_ranks.read(tmp_path / "run") == losses
        rows.append(losses.in_a_row)
    assert rows == [1, 2, 1, 2, 3, 1, 2, 1]
    (tmp_path / "run" / lost_ranks.FILE).write_text("[", encoding="utf-8")
    assert lost_ranks.read(tmp_path / "run") == lost_ranks.Losses()


@pytest.mark.parametrize("admitted", [(0, 1, 2), (2, 0, 1)])
def test_rank_zero_ends_after_all_others_know_why(admitted):
    """Its process takes the server with it."""
    received = []
    server = MonitorServer(listener=None, token="", world=WORLD, hang_seconds=60)
    for rank in admitted:
        line = SimpleNamespace(send=lambda message, rank=rank: received.append((rank, message["end"])))
        server.members[rank] = RankStatus(rank, "host", 100 + rank, line, last_heard=0.0, advanced=0.0)
    server.members[1].left = True
    server._end("rank 1 is gone")
    assert received == [(2, "rank 1 is gone"), (0, "rank 1 is gone")]


def test_a_rank_that_hangs_is_distinguished_from_those_that_wait_for_it(tmp_path):
    codes, pids, lines = run(tmp_path, be_stuck, hang_seconds=8.0)
    assert codes == [75, 75, 75]
    late, hung = lines
    assert re.fullmatch(rf"warning: rank 2 \(host \S+, pid {pids[2]}, step 7\) made no progress for \d s; .*", late)
    assert re.fullmatch(rf"error: rank 2 \(host \S+, pid {pids[2]}, step 7\) made no progress for \d s; .*", hung)
    assert "be_stuck" in (tmp_path / "rank2.log").read_text()  # where it is


def test_a_late_rank_is_named_and_may_continue(tmp_path):
    codes, pids, lines = run(tmp_path, be_late, hang_seconds=20.0)
    assert codes == [0, 0, 0]
    assert len(lines) == 1 and re.search(rf"pid {pids[2]}, step 7\) made no progress for \d s", lines[0])


def test_a_rank_whose_launcher_is_gone_is_asked_to_end_once(tmp_path):
    codes, _, lines = run(tmp_path, lose_its_launcher)
    said = {f"rank {rank} was asked {int(rank == 1)} times" for rank in range(WORLD)}
    assert codes == [0, 0, 0] and said == {line for line in lines if "asked" in line}
    assert "the launcher of this rank is gone" in (tmp_path / "rank1.log").read_text()


def test_an_error_of_one_rank_ends_the_others(tmp_path):
    codes, pids, lines = run(tmp_path, raise_an_error)
    assert codes == [1, 1, 1] and lines == []
    for rank in (0, 2):
        log = (tmp_path / f"rank{rank}.log").read_text()
        assert f"rank 1 (host {os.uname().nodename}, pid {pids[1]}, starting) has stopped: KeyError: 'of rank 1'" in log
