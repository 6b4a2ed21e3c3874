"""A sample gives a loss that is not finite: nothing is updated, and the step can be run again."""

import json
import math
import re
import subprocess

import pytest
from launch import TOY, deepspeed, forks, losses, pretrain, rows, run

from mug.run.state import checkpoint

BATCH = 8
BAD = 21  # this position: in step 3, of rank 1 of 2 (positions go to the ranks in turn)
OPTIONS = [
    *TOY,
    *("--trainer.max_steps", "5", "--trainer.micro_batch", "2", "--trainer.eval_samples", "8"),
    *("--checkpoint.every_steps", "1", "--checkpoint.keep", "9"),
    # The same learning rate wherever a run ends.
    *("--trainer.base_learning_rate", "6e-3", "--trainer.min_learning_rate", str(6e-3 * BATCH / 256)),
]
POISONED = ["tests/end_to_end/poisoned.py"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = pretrain(output, *OPTIONS, launcher=forks(2))
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def digests(output, step: int) -> dict[str, str]:
    """Of weights and moments, over all ranks."""
    return checkpoint.verify(output / f"checkpoint-{step}").manifest["digests"]


def replay(bundle) -> subprocess.CompletedProcess:
    return run([*forks(1), *POISONED, "run/replay.py", str(bundle)])


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False], ids=["saved before", "not saved"])
def test_training_stops_before_the_update(tmp_path, monkeypatch, undisturbed, saved):
    monkeypatch.setenv("POISON", f"{BAD}")
    options = [*OPTIONS, *([] if saved else ["--checkpoint.every_steps", "1000"])]
    done = pretrain(tmp_path, *options, launcher=[*deepspeed(2), *POISONED])
    assert done.returncode == 3
    bundle = tmp_path / "replay" / "step-3.json"
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: loss or gradient of step 3 is not finite; nothing was updated; to reproduce it: run/replay.py {bundle}"
    ]
    assert digests(tmp_path, 2) == digests(undisturbed, 2) != digests(undisturbed, 3)
    assert checkpoint.newest(tmp_path, warn=pytest.fail).step == 2

    ran = json.loads(bundle.read_text())["micro_batches"]
    bad = [one for one in ran if "nan" in one["losses"].values()]
    assert len(ran) == 4 and sorted(p for one in ran for p in range(*one["positions"])) == list(range(16, 24))
    assert [(one["rank"], BAD in range(*one["positions"])) for one in bad] == [(1, True)]

    again = replay(bundle)  # one rank runs what two ran
    assert again.returncode == 0, again.stdout + again.stderr
    pixels = bad[0]["losses"]["pixels"]
    assert f"rank 1, positions 21 to 23 by 2: pixels {pixels} ({pixels} in the run), caption nan (nan" in again.stdout
    assert "step 3: 4 of 4 micro-batches gave the losses of the run; the gradient is not finite" in again.stdout
    monkeypatch.setenv("POISON", "-1")  # had it been the machine's fault
    healthy = replay(bundle)
    assert healthy.returncode == 1
    assert "step 3: 3 of 4 micro-batches gave the losses of the run; the gradient is finite" in healthy.stdout


@pytest.mark.slow
def test_a_batch_is_skipped_and_the_run_that_is_killed_afterwards_knows(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setenv("POISON", f"{BAD}:inf")
    skip = ("--faults.nonfinite", "skip", "--faults.max_skips", "1")
    done = pretrain(tmp_path, *OPTIONS, *skip, "--trainer.max_steps", "3", launcher=[*forks(2), *POISONED])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its batch is skipped" in done.stdout
    assert digests(tmp_path, 3) == digests(tmp_path, 2)
    assert checkpoint.verify(tmp_path / "checkpoint-3").manifest["data"]["skipped"] == [[16, 24]]
    (event,) = [row for row in rows(tmp_path, "event") if row["event"] == "skip"]
    assert (event["step"], event["positions"]) == (3, [16, 24])
    curve = losses(tmp_path)
    assert [row["position"] for row in curve] == [8, 16, 24] and curve[2]["loss/total"] is None

    monkeypatch.setenv("POISON", f"{BAD + BATCH}")  # once more is once too often, although the run was restarted
    done = pretrain(tmp_path, *OPTIONS, *skip, launcher=[*forks(2), *POISONED])
    assert done.returncode != 0 and "error: loss or gradient of step 4 is not finite" in done.stderr
    assert digests(tmp_path, 3) == digests(undisturbed, 2)


@pytest.mark.slow
def test_the_very_first_batch_is_skipped(tmp_path, monkeypatch):
    """Without ZeRO the optimizer has no state before its first update; the run is saved all the same, and continues."""
    monkeypatch.setenv("POISON", "3")
    options = (*OPTIONS, "--faults.nonfinite", "skip")
    for steps in ("1", "2"):
        done = pretrain(
            tmp_path,
            *(*options, "--trainer.max_steps", steps),
            launcher=[*forks(1), *POISONED],
            config="ds_configs/zero0.json",
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step 1" in done.stdout
    manifests = [checkpoint.verify(tmp_path / f"checkpoint-{step}").manifest for step in (1, 2)]
    assert [manifest["adam_steps"] for manifest in manifests] == [0, 1]
    assert manifests[1]["data"]["skipped"] == [[0, 8]]
    assert [row["loss/total"] is None for row in losses(tmp_path)] == [True, False]


@pytest.mark.slow
def test_a_spike_is_undone_and_what_led_to_it_is_skipped(tmp_path, monkeypatch):
    """The loss of one sample is 1e4 too high at step 11, which a loss above 3 times the median gives away."""
    monkeypatch.setenv("POISON", f"{10 * BATCH + 5}:1e4")
    spikes = ("--faults.spike_factor", "3", "--faults.spike_checkpoints", "2", "--checkpoint.every_steps", "4")
    options = (*OPTIONS, "--trainer.max_steps", "13", *spikes)
    done = pretrain(tmp_path, *options, launcher=[*forks(1), *POISONED])
    assert done.returncode == 75
    assert re.search(
        r"the loss of step 11, .* is a spike .*: rolled back to the state of step 4, positions 32 to 87", done.stdout
    )
    assert digests(tmp_path, 11) == digests(tmp_path, 4)
    assert checkpoint.verify(tmp_path / "checkpoint-11").manifest["data"]["skipped"] == [[32, 88]]

    done = pretrain(tmp_path, *options, launcher=[*forks(1), *POISONED])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step 11" in done.stdout
    curve = losses(tmp_path)
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 12, 13]
    assert [row["position"] for row in curve][-2:] == [96, 104]
    assert all(math.isfinite(row["loss/total"]) and row["loss/total"] < 3 for row in curve)
    (event,) = [row for row in rows(tmp_path, "event") if row["event"] == "rollback"]
    assert (event["step"], event["to"], event["positions"]) == (11, 4, [32, 88])
    assert checkpoint.verify(tmp_path / "checkpoint-13").manifest["data"]["skipped"] == [[32, 88]]


@pytest.mark.slow
def test_what_is_no_bundle_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for name, says in {"x.json": "is not a replay bundle", "y.json": "No such file"}.items():
        done = run(["run/replay.py", str(tmp_path / name)])
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and says in done.stderr
