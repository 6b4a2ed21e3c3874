"""What the environment says of a rank's place: as each launcher says it, or in one line what is wrong with it."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from commands import run_script

from mug.run.common.errors import RunError
from mug.run.common.rank_env import Place, duration, find_place, take_place

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ("", Place(0, 1, 0, 1)),
        ("RANK=0", Place(0, 1, 0, 1)),
        ("WORLD_SIZE=1 RANK=", Place(0, 1, 0, 1)),
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", Place(3, 4, 1, 2)),  # torchrun
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_SIZE=2", Place(3, 4, 1, 2)),  # deepspeed
        ("RANK=3 WORLD_SIZE=4", Place(3, 4, 0, 1)),  # Kubeflow's PyTorchJob: a pod each
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1", Place(3, 4, 1, 2)),
        (
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2",
            Place(3, 4, 1, 2),
        ),
        ("PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", Place(3, 4, 1, 2)),
        ("RANK=1 WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1", Place(1, 2, 0, 1)),
    ],
)
def test_a_place_is_found(variables, place):
    assert find_place(dict(one.split("=") for one in variables.split())) == place


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ("RANK=3", "RANK=3 is set without WORLD_SIZE: unset RANK, or start all ranks with a launcher"),
        ("WORLD_SIZE=4", "WORLD_SIZE=4 is set without RANK: unset WORLD_SIZE"),
        ("RANK=4 WORLD_SIZE=4", "RANK=4 is not below WORLD_SIZE=4"),
        ("RANK=one WORLD_SIZE=4", "RANK=one in the environment is not an integer"),
        ("RANK=-1 WORLD_SIZE=4", "RANK=-1 in the environment is not an integer"),
        ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK=2 is not below the 2 ranks of this host"),
        ("RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2x", "LOCAL_WORLD_SIZE=2x in the environment is not an integer"),
        ("RANK=0 WORLD_SIZE=4", "MASTER_ADDR is not set, but the 4 ranks are on several hosts"),
        ("RANK=0 WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=70000", "MASTER_PORT=70000 is not a port"),
        ("MASTER_PORT=http", "MASTER_PORT=http in the environment is not an integer"),
    ],
)
def test_what_is_no_place_is_one_line(monkeypatch, variables, says):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for one in variables.split():
        monkeypatch.setenv(*one.split("="))
    with pytest.raises(RunError) as refused:
        take_place()
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2",
         "127.0.0.1:29500"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=4000", "node1:4000"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=node1", "node1:29500"),
    ],
)  # fmt: skip
def test_what_is_found_is_what_the_rest_of_the_program_reads(monkeypatch, variables, address):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    for one in variables.split():
        monkeypatch.setenv(*one.split("="))
    place = take_place()
    assert take_place() == place
    assert f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" == address
    assert (os.environ["RANK"], os.environ["LOCAL_SIZE"]) == (str(place.rank), str(place.local_world))


@pytest.mark.parametrize(("text", "seconds"), [("", 300), ("90", 90), ("1.5s", 1.5), ("5m", 300), ("1 h", 3600)])
def test_a_duration_may_have_a_unit(monkeypatch, text, seconds):
    monkeypatch.setenv("MUG_RENDEZVOUS_SECONDS", text)
    assert duration("MUG_RENDEZVOUS_SECONDS", 300) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "5 minutes", "1e400", "9" * 30])
def test_what_is_no_duration_is_one_line(monkeypatch, text):
    monkeypatch.setenv("MUG_RENDEZVOUS_SECONDS", text)
    with pytest.raises(RunError, match=r"MUG_RENDEZVOUS_SECONDS=.* is not a duration: set seconds"):
        duration("MUG_RENDEZVOUS_SECONDS", 300)


def test_a_stale_rank_does_not_silence_a_command():
    done = run_script("run/check_hosts.py", "nothing", env=os.environ | {"RANK": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error: nothing")


# --- Who reports ------------------------------------------------------------------------------------------

# Rank 0 is late, as it is when it waits for the others to leave.
FAILS = """
import os, sys, time
from pathlib import Path
from mug.run.common import console
from mug.run.common.errors import RunError, ReportedByRankZero
console.SPEAKING_SECONDS = 2.0
rank, kind = os.environ["RANK"], sys.argv[1]

def main(_):
    if rank == "0":
        time.sleep(60 if kind == "one rank" else 1)
    if kind == "one rank" and rank != "3":
        time.sleep(60)
    raise (ReportedByRankZero if kind == "rank zero" and rank != "0" else RunError)("the reason")

Path(f"{rank}.imported").touch()
while len([*Path().glob("*.imported")]) < 4:  # which takes a busy machine seconds, more for one than for another
    time.sleep(0.01)
console.run_command(main)
"""


@pytest.mark.parametrize(
    ("kind", "line"),
    [("alike", "error: the reason"), ("rank zero", "error: the reason"), ("one rank", "error: rank 3: the reason")],
)
def test_who_has_the_reason_says_it_before_a_launcher_ends_all(tmp_path, kind, line):
    """DeepSpeed's ends them when the first has ended."""
    said = tmp_path / "said"
    with said.open("w") as file:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", FAILS, kind],
                env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_SIZE": "4"},
                stderr=file,
                cwd=tmp_path,
            )
            for rank in range(4)
        ]
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.01)
        statuses = {rank.returncode for rank in ranks} - {None}
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert said.read_text() == line + "\n" and statuses == {2}
