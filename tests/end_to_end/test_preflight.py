"""run/preflight.py on two ranks that are not alike."""

import os
import shutil
import subprocess
import sys

import pytest
from launch import ROOT, TOY, ZERO3, environment, free_port

from mug.data.builders.openmoji import ensure_openmoji
from mug.data.config import DataConfig

SCRIPT = str(ROOT / "run" / "preflight.py")
TWO = ("gpu", "clock", "shared folder", "bandwidth")


def preflight(folders, *options: str, second: tuple[str, ...] = (), **variables: str):
    """Two ranks, each in its own folder, the second one behind the command `second` and with `variables`."""
    output = folders[0].parent / "run"
    command = [sys.executable, SCRIPT, "--deepspeed", str(ROOT / ZERO3), "--output", str(output), *TOY, *options]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [*(second if rank else ()), *command],
            cwd=folders[rank],
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (variables if rank else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    (out, err), other = (rank.communicate(timeout=300) for rank in ranks)
    assert other == ("", "")
    assert ranks[0].returncode == ranks[1].returncode, out + err
    assert not output.exists() and not list(output.parent.glob(".preflight*"))
    return ranks[0].returncode, out, err


def verdicts(table: str) -> dict[str, str]:
    """The last column by the first; lines that continue the one above count with it."""
    found, check = {}, ""
    for line in table.splitlines():
        if line.startswith("│"):
            first, _, last = (cell.strip() for cell in line.strip("│").split("│"))
            check = first or check
            found[check] = f"{found.get(check, '')} {last}".strip()
    return found


@pytest.fixture
def folders(tmp_path):
    """Where two ranks work: the disks of two machines, each with the same shards."""
    made = ensure_openmoji(DataConfig().cache_folder())
    both = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in both:
        folder.mkdir()
        shutil.copy(sorted(made.glob("train-*.tar"))[0], folder / "pairs.tar")
        shutil.copy(made / "tokenizer.json", folder)
    return both


OWN = ["--data.shards", "pairs.tar", "--data.tokenizer", "tokenizer.json"]


@pytest.mark.slow
def test_ready(folders):
    status, out, err = preflight(folders, *OWN)
    assert (status, err) == (0, "")
    assert set(verdicts(out).values()) == {"ok"} and set(TWO) < set(verdicts(out))
    assert "8 = 4 x 1 accumulation x 2 rank(s)" in out
    assert out.splitlines()[-1] == "ready: 2 rank(s) on 1 host(s)"


@pytest.mark.slow
def test_another_shard_on_one_machine_and_no_room_for_checkpoints(folders):
    made = ensure_openmoji(DataConfig().cache_folder())
    shutil.copy(sorted(made.glob("train-*.tar"))[1], folders[1] / "pairs.tar")
    status, out, _ = preflight(folders, *OWN, "--checkpoint.keep", "1000000000")
    assert status == 1
    assert out.splitlines()[-1] == "NOT ready: index, disk"
    assert "rank 1 on" in verdicts(out)["index"] and "rank 0 on" in verdicts(out)["index"]
    assert "too little space" in verdicts(out)["disk"]


@pytest.mark.slow
def test_no_shards_and_no_such_interface_on_one_machine(folders):
    """Found without a process group, which would wait for the rank that cannot join."""
    (folders[1] / "pairs.tar").unlink()
    status, out, _ = preflight(folders, *OWN, GLOO_SOCKET_IFNAME="eth77")
    assert status == 1
    assert out.splitlines()[-1] == "NOT ready: index, network"
    assert "rank 1 on" in verdicts(out)["index"] and "pairs.tar" in verdicts(out)["index"]
    assert "GLOO_SOCKET_IFNAME names eth77" in verdicts(out)["network"]
    assert "bandwidth" not in verdicts(out)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs apt package faketime")
def test_a_clock_that_is_wrong(folders):
    status, out, _ = preflight(folders, *OWN, second=("faketime", "-f", "+90"))
    assert status == 1
    assert out.splitlines()[-1] == "NOT ready: clock"
    assert "+90.0 s from rank 0's clock" in verdicts(out)["clock"]


@pytest.mark.slow
def test_a_wrong_command_is_refused_as_by_the_run(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--deepspeed", ZERO3, "--trainer.globl_batch", "8"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "globl_batch" in done.stderr and len(done.stderr.splitlines()) == 1
