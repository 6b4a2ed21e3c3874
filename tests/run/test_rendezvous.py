"""Ranks that meet before there is a process group."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from mug.run.cluster.rendezvous import rendezvous
from mug.run.common.errors import RankLocalError, RunError


@pytest.fixture(autouse=True)
def port(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    monkeypatch.setenv("MUG_RENDEZVOUS_SECONDS", "2")
    for variable in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    return found


def meet_all(ranks: list[int], world: int) -> list:
    """What `meet` gives or raises, of several ranks at once."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        calls = [pool.submit(rendezvous, rank, world) for rank in ranks]
        return [call.exception() or call.result() for call in calls]


def test_all_ranks_get_one_store():
    first, _, third = meet_all([0, 1, 2], world=3)
    first.set("key", "said by rank 0")
    assert third.get("key") == b"said by rank 0"


def test_those_that_do_not_come_are_named():
    zero, two = meet_all([0, 2], world=4)
    assert type(zero) is RunError and "rank(s) 1, 3 of 4 did not reach the rendezvous" in str(zero)
    assert socket.gethostname() in str(zero)
    assert type(two) is RankLocalError and "rank 0 at 127.0.0.1" in str(two)


def test_no_rank_zero(port):
    (one,) = meet_all([1], world=2)
    assert type(one) is RankLocalError and f"rank 1 on {socket.gethostname()} cannot reach 127.0.0.1:{port}" in str(one)


def test_a_port_in_use(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(RunError, match=f"port {port} of .* is in use"):
            rendezvous(0, 1)


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["nothing", "something else"])
def test_another_program_on_the_port(port, monkeypatch, says):
    """It takes the connection; what it says is not what rank 0 would say."""
    monkeypatch.setattr("mug.run.cluster.rendezvous.MARGIN", 1.0)
    with socket.create_server(("127.0.0.1", port)) as other:
        answer = threading.Thread(target=lambda: kept.append(_greeted(other, says)), daemon=True)
        kept: list[socket.socket] = []
        answer.start()
        begin = time.monotonic()
        with pytest.raises(RankLocalError) as refused:
            rendezvous(1, 2)
        assert time.monotonic() - begin < 60  # it used to be for ever
    (line,) = str(refused.value).splitlines()
    assert f"cannot reach 127.0.0.1:{port}; " in line and "taken by another program" in line


def _greeted(server: socket.socket, says: bytes) -> socket.socket:
    """The first connection, once it was said to; open as long as somebody holds it."""
    connection, _ = server.accept()
    connection.sendall(says)
    return connection


def test_a_restart_under_torchrun_begins_afresh(port, monkeypatch):
    """The agent's store lives on, with what the ranks before wrote into it."""
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not any(isinstance(got, Exception) for got in meet_all([0, 1], world=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (zero,) = meet_all([0], world=2)
    assert "rank(s) 1 of 2 did not reach the rendezvous" in str(zero)
    del agent
