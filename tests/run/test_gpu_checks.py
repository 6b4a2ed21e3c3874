"""run/gpu_checks.sh: its dry run on a CPU, and what it leaves when it or one of its parts is killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest
import torch

from mug.kernels import attention
from mug.run import bench_kernels, bench_model, bench_step
from mug.run.pretrain import DEFAULT_RECIPE
from mug.run.training.recipe import parse_command

ROOT = Path(__file__).parents[2]
PARTS = ["machine", "train", "resume", "patches", "head", "packed", "dense"]
PARTS += ["base", "large", "huge", "zero1", "zero3", "compiled", "markdown", "tests"]

# In the place of Python: parts that take no time, but for one that fails and one that PYTHON_HANGS names.
STUB = """#!/bin/bash
(IFS=$'\\t'; echo "$*" >>"$0.commands")
case "$*" in
  -c*) exit 0 ;;
  *"${PYTHON_HANGS:-nothing}"*) echo "begun"; sleep 600 ;;
  "-m pytest "*) echo; echo "7 passed in 1 s" ;;
  *"--preset large"*) echo "does not fit this GPU"; exit 2 ;;
  *--json*) echo '{"kind": "time"}' >"${@: -1}"; echo "kernels at 90%" ;;
  *) echo "$*" ;;
esac
"""


@pytest.fixture
def stub(tmp_path) -> dict[str, str]:
    """The environment in which gpu_checks.sh has its parts done by STUB."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    return {**os.environ, "PYTHON": str(python)}


def check(folder: Path, *options: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["bash", "run/gpu_checks.sh", *options, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def verdicts(table: str) -> dict[str, str]:
    """Part → PASS, FAIL, STOPPED or LEFT."""
    return {line.split()[0]: line.split()[1] for line in table.splitlines()}


def read_results(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """The table's verdicts and the archive's files; fails unless all three files are whole."""
    assert {file.name for file in folder.iterdir()} <= {"table.txt", "results.tgz", "attention_table.json"}
    assert {"measured", "entries"} == json.loads((folder / "attention_table.json").read_text()).keys()
    with tarfile.open(folder / "results.tgz") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    return verdicts((folder / "table.txt").read_text()), files


def test_a_part_that_fails_stops_none_of_the_others(tmp_path, stub):
    done = check(tmp_path / "out", environment=stub)
    assert done.returncode == 1, done.stdout + done.stderr
    table, files = read_results(tmp_path / "out")
    expected = {**dict.fromkeys(PARTS, "PASS"), "large": "FAIL"}
    assert {part: table[part] for part in PARTS} == expected
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(r"tests      PASS    +\d+ s  7 passed in 1 s", line) for line in lines)
    assert any(line.startswith("large      FAIL ") and line.endswith(" does not fit this GPU") for line in lines)
    assert files["./dense.jsonl"] == b'{"kind": "time"}\n' and files["./tests.log"] == b"\n7 passed in 1 s\n"
    assert files["./resume.log"].decode().split()[:3] == ["run/pretrain.py", "--deepspeed", "ds_configs/zero3.json"]


def test_the_programs_take_what_they_are_given_on_a_gpu(tmp_path, stub, monkeypatch):
    check(tmp_path / "out", environment=stub)
    commands = [
        line.split("\t") for line in Path(f"{stub['PYTHON']}.commands").read_text(encoding="utf-8").splitlines()
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(ROOT)
    parsers = {"bench_kernels": bench_kernels.parse, "bench_model": bench_model.parse, "bench_step": bench_step.parse}
    parsers["pretrain"] = lambda: parse_command("pretrain.py", "", DEFAULT_RECIPE)
    parsed = []
    for command in commands:
        for place, word in enumerate(command):
            if word.startswith("run/") and word.endswith(".py"):
                monkeypatch.setattr(sys, "argv", command[place:])
                parsed.append((Path(word).stem, parsers[Path(word).stem]()))
    assert [name for name, _ in parsed[:3]] == ["pretrain", "pretrain", "bench_kernels"] and len(parsed) == 12
    first, again = parsed[0][1], parsed[1][1]
    assert first.recipe.trainer.max_steps < again.recipe.trainer.max_steps and first.output == again.output
    assert first.recipe.checkpoint.asynchronous and first.deepspeed.name == "zero3.json"
    packed, dense = (options for _, options in parsed[4:6])
    assert packed.write_table and dense.write_table
    for shape in ("B=256 N=64->65 H=12 D=64 packed", "B=256 N=50 H=12 D=64"):
        assert bool(re.search(packed.shapes, shape)) != bool(re.search(dense.shapes, shape))
    ours = {*attention.BACKENDS, "chunked", "every patch", "F.linear_cross_entropy"}
    assert all(set(options.contenders) <= ours for name, options in parsed if name == "bench_kernels")


def test_a_part_that_hangs_is_stopped_and_none_begins_where_no_time_is_left(tmp_path, stub):
    done = check(tmp_path / "out", "--seconds", "16", environment={**stub, "PYTHON_HANGS": "benchmarks.versions"})
    assert done.returncode == 1
    table, files = read_results(tmp_path / "out")
    assert {part: table[part] for part in PARTS} == {**dict.fromkeys(PARTS, "LEFT"), "machine": "STOPPED"}
    assert files["./machine.log"] == b"begun\n"
    assert not [p for p in psutil.process_iter() if str(tmp_path) in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_after(seconds: float, folder: Path, *options: str, environment: dict[str, str]) -> list[str]:
    """Kill gpu_checks.sh and all that it has started; returns the lines of the parts that had finished."""
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        command = ["bash", "run/gpu_checks.sh", *options, str(folder)]
        session = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, start_new_session=True)
    try:
        session.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(session.pid, signal.SIGKILL)
    session.wait()
    for process in psutil.process_iter():  # a part is a process group of its own, in the session
        if _session(process.pid) == session.pid:
            process.kill()
    return [line for line in folder.with_suffix(".log").read_text().splitlines() if line.split(" ")[0] in PARTS]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def assert_nothing_is_lost(folder: Path, finished: list[str]) -> None:
    if not finished and len(list(folder.glob("*"))) < 3:
        return  # killed before the first file was there
    _, files = read_results(folder)
    text = (folder / "table.txt").read_text()
    assert all(line in text for line in finished)
    assert {f"./{line.split()[0]}.log" for line in finished} <= files.keys()
    assert files["table.txt"].decode() in text or text in files["table.txt"].decode()  # one part newer at most


@pytest.mark.parametrize("attempt", range(3))
def test_a_kill_at_any_moment_leaves_whole_files_with_all_that_had_finished(tmp_path, stub, attempt):
    seconds = random.uniform(0.5, 4)
    print(f"killed after {seconds} s")
    assert_nothing_is_lost(tmp_path / "out", kill_after(seconds, tmp_path / "out", environment=stub))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, stub):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = check(tmp_path / "out", "--work", str(tmp_path / "mine"), environment=stub)
    assert done.returncode == 2 and (tmp_path / "mine" / "thesis.tex").exists()
    assert done.stderr == f"error: --work {tmp_path / 'mine'} holds something else; name another folder\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device", "tpu"], "--device tpu is not one of cuda, cpu"),
        (["--seconds", "soon"], "--seconds soon is not a number of seconds"),
        (["--seconds"], "--seconds is not a number of seconds"),
        (["--fast"], "--fast is not an option; there are --device, --seconds and --work"),
    ],
)
def test_a_wrong_option_ends_with_one_line(stub, options, message):
    command = ["bash", "run/gpu_checks.sh", *options]
    done = subprocess.run(command, cwd=ROOT, env=stub, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and " ".join(done.stderr.split()) == f"error: {message}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = check(tmp_path / "out", environment={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1 and "finds no GPU" in done.stderr


# In the place of Python: pip that leaves one wheel, and an embedded default of one file.
BUNDLE_STUB = """#!/bin/bash
case "$*" in
  *"pip"*"download"*) echo "$*" >"${@: -11:1}/names-1-py3-none-any.whl" ;;
  *openmoji*) echo "$SHARD" ;;
esac
"""


def bundle(tmp_path: Path, shard_bytes: int) -> subprocess.CompletedProcess:
    """Run gpu_bundle.sh with one shard of that size."""
    python, shard = tmp_path / "python", tmp_path / "train-00000.tar"
    python.write_text(BUNDLE_STUB)
    python.chmod(0o755)
    with open(shard, "wb") as file:
        file.truncate(shard_bytes)
    environment = {**os.environ, "PYTHON": str(python), "SHARD": str(shard)}
    command = ["bash", "run/gpu_bundle.sh", str(tmp_path / "bundle")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_bundle_holds_pinned_wheels_and_shards_and_says_its_size(tmp_path):
    for _ in range(2):  # a second one takes the place of the first
        done = bundle(tmp_path, 10 * 2**20)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "bundle" / "shards" / "train-00000.tar").stat().st_size == 10 * 2**20
    assert done.stdout.splitlines()[-1] == f"bundle: 10 of 64 MiB, in {tmp_path / 'bundle'}"
    (wheel,) = (tmp_path / "bundle" / "wheels").iterdir()
    names = wheel.read_text().split()[-10:]
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in (ROOT / "constraints.txt").open()}
    assert {"pydantic_core", "jsonargparse", "simplejpeg"} <= set(names)
    assert {name.replace("_", "-") for name in names} <= pinned


def test_a_bundle_that_is_too_large_is_refused(tmp_path):
    done = bundle(tmp_path, 65 * 2**20)
    assert done.returncode == 2 and "has 65 MiB and must stay below 64" in done.stderr


def test_a_bundle_does_not_replace_another_folder(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").touch()
    done = bundle(tmp_path, 1)
    assert done.returncode == 2 and done.stderr.endswith("bundle holds something else; name another folder\n")
    assert (tmp_path / "bundle" / "thesis.tex").exists()


@pytest.mark.slow
def test_the_dry_run_goes_through_all_parts(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    done = check(tmp_path / "out", "--device", "cpu", "--seconds", "1200", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    table, files = read_results(tmp_path / "out")
    assert table == dict.fromkeys(PARTS, "PASS")
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "step 4  held out: " in text and "step 6  held out: " in text and "zero3.json: bare loop" in text
    rows = [json.loads(line) for line in files["./dense.jsonl"].splitlines()]
    assert {row["contender"] for row in rows if row["kind"] == "time"} == {"sdpa", "sdpa_flash"}
    assert "tiny compiled, batch 4" in files["benchmarks.md"].decode()
    steps = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    assert [row["step"] for row in steps if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_dry_run_that_is_killed_leaves_what_it_knew(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    seconds = random.uniform(3, 60)
    print(f"killed after {seconds} s")
    finished = kill_after(seconds, tmp_path / "out", "--device", "cpu", environment=environment)
    assert_nothing_is_lost(tmp_path / "out", finished)
