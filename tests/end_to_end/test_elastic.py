"""One run whose number of ranks, and ZeRO stage, change on the way."""

import itertools

import pytest
from launch import TOY, forks, losses, pretrain, rows

BATCH = 24
OPTIONS = [
    *TOY,
    *("--trainer.global_batch", str(BATCH), "--trainer.micro_batch", "2", "--trainer.eval_samples", "8"),
    # The same learning rate wherever a leg ends.
    *("--trainer.base_learning_rate", "6e-3", "--trainer.min_learning_rate", str(6e-3 * BATCH / 256)),
]
STEPS = 3  # of each leg
LEGS = {
    "stage 1": [(4, 1), (2, 1), (3, 1), (1, 1)],
    "stage 2": [(4, 2), (2, 2), (3, 2), (1, 2)],
    "stage 3": [(4, 3), (2, 3), (3, 3), (1, 3)],
    "stages 1, 3, 2, 0": [(4, 1), (2, 3), (3, 2), (1, 0)],
}


def leg(output, ranks: int, stage: int, steps: int, *options: str) -> str:
    config = f"ds_configs/zero{stage}.json"
    maximum = ("--trainer.max_steps", str(steps))
    launcher = [*forks(ranks), "tests/end_to_end/witness.py"]
    done = pretrain(output, *OPTIONS, *maximum, *options, launcher=launcher, config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def witnessed(tmp_path, monkeypatch):
    """A file for each rank, of the positions that it trains on: a micro-batch a line."""
    folder = tmp_path / "witnessed"
    folder.mkdir()
    monkeypatch.setenv("WITNESS", str(folder))
    return folder


def take_positions(witnessed, ranks: int) -> list[list[int]]:
    """What each rank has trained on since the last time."""
    files = [witnessed / f"rank-{rank}" for rank in range(ranks)]
    positions = [[int(word) for word in file.read_text().split()] for file in files]
    for file in files:
        file.unlink()
    assert not list(witnessed.iterdir())
    return positions


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WITNESS", str(output.parent))
        leg(output, ranks=1, stage=0, steps=4 * STEPS)
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize("legs", LEGS.values(), ids=LEGS)
def test_4_to_2_to_3_to_1_ranks(tmp_path, witnessed, undisturbed, legs):
    """That what is loaded is what was saved, each start proves by the digests in the manifest, or refuses."""
    for number, (ranks, stage) in enumerate(legs, 1):
        said = leg(tmp_path, ranks, stage, number * STEPS)
        assert number == 1 or f"resuming after step {(number - 1) * STEPS}" in said
        positions = take_positions(witnessed, ranks)
        assert all(mine == sorted(mine) for mine in positions)
        assert sorted(itertools.chain(*positions)) == list(range((number - 1) * STEPS * BATCH, number * STEPS * BATCH))
    curve = losses(tmp_path)
    assert [row["position"] for row in curve] == [BATCH * step for step in range(1, 4 * STEPS + 1)]
    for mine, other in zip(curve, undisturbed, strict=True):
        for name in ("loss/total", "loss/pixels", "loss/caption"):
            assert mine[name] == pytest.approx(other[name], abs=1e-3), f"step {mine['step']}"
    lives = [row for row in rows(tmp_path, "event") if row["event"] in ("start", "resume")]
    assert [(row["world_size"], row["zero_stage"]) for row in lives] == legs


@pytest.mark.slow
def test_saves_by_the_clock_and_behind_training(tmp_path):
    """Two ranks agree on when a checkpoint is due, and on when it is written."""
    often = ("--checkpoint.every_minutes", "1e-6", "--checkpoint.asynchronous", "true", "--checkpoint.keep", "9")
    leg(tmp_path, 2, 3, 4, *often, "--trainer.log_every", "2")
    saved = [row for row in rows(tmp_path, "event") if row["event"] == "checkpoint"]
    assert [row["step"] for row in saved] == [2, 4]
    assert all(row["write_seconds"] > 0 for row in saved)
    assert "resuming after step 4" in leg(tmp_path, 1, 2, 5)
