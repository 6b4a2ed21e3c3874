"""Fine-tuning as users start it: from a pre-trained run, killed and resumed, on several ranks."""

import gzip
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launch import PYTHON, ROOT, TOY, ZERO3, environment, forks, losses, pretrain, rows, run

from mug.run.state import checkpoint
from mug.run.state.sharded_state import WEIGHT, ParamSlice, SavedState

STEPS = 24
OPTIONS = [
    *("--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--model.image_size", "16"),
    *("--model.patch_size", "8", "--model.drop_path", "0.3", "--data.workers", "0"),
    *("--data.augment.rand_augment", "rand-m9-mstd0.5-inc1", "--data.augment.erase", "0.25"),
    *("--data.augment.mixup", "0.8", "--data.augment.cutmix", "1.0"),
    *("--trainer.global_batch", "8", "--trainer.micro_batch", "4", "--trainer.log_every", "1"),
    *("--trainer.max_steps", str(STEPS), "--trainer.warmup_samples", "0", "--trainer.eval_every", "7"),
    *("--checkpoint.every_steps", "3", "--checkpoint.keep", "2"),
]
UNMIXED = ["--data.augment.mixup", "0", "--data.augment.cutmix", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Fashion-MNIST's files with 40 pictures of noise, brighter by class."""
    folder = tmp_path_factory.mktemp("fashion")
    labels = np.arange(40, dtype=np.uint8) % 10
    noise = np.random.default_rng(0).integers(0, 60, (40, 28, 28))
    pixels = (noise + 20 * labels[:, None, None].astype(int)).astype(np.uint8)
    for split in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">i4").tobytes()
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return folder


def command(
    output: Path, images: Path, *options: str, launcher: list[str] = PYTHON, config: str = "zero1"
) -> list[str]:
    start = [*launcher, "run/finetune.py", "--deepspeed", f"ds_configs/{config}.json", "--output", str(output)]
    return [*start, "--data.images", f"fashion-mnist:{images}", *OPTIONS, *options]


def finetune(*arguments, **settings) -> subprocess.CompletedProcess:
    return run(command(*arguments, **{"launcher": [], **settings}))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, images) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = finetune(output, images)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(output, "train")) == STEPS and [row["step"] for row in rows(output, "eval")] == [7, 14, 21, STEPS]
    return output


def stop_when(reached: Callable[[], bool], number: signal.Signals, output: Path, images: Path) -> tuple[int, str]:
    """Start the run, and send it the signal as soon as `reached()`; its exit status, and what it said."""
    process = subprocess.Popen(
        command(output, images),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not reached():
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate()
    return process.returncode, said


@pytest.mark.slow
def test_asked_to_end_then_killed_then_resumed_gives_the_same_losses_to_the_digit(tmp_path, images, undisturbed):
    output = tmp_path / "run"
    metrics = output / "metrics.jsonl"
    code, said = stop_when(metrics.exists, signal.SIGTERM, output, images)
    saved = checkpoint.newest(output, warn=pytest.fail).step
    assert code == 75 and f"SIGTERM: step {saved} is saved; rerun the same command to resume" in said, said
    assert saved < STEPS

    code, said = stop_when(lambda: metrics.read_text().count('"train"') >= saved + 5, signal.SIGKILL, output, images)
    assert code == -signal.SIGKILL, f"the run ended before it could be killed: {said}"
    assert f"resuming after step {saved} from" in said

    done = finetune(output, images)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step" in done.stdout
    assert losses(output) == losses(undisturbed) and losses(output, "eval") == losses(undisturbed, "eval")
    lives = [row["event"] for row in rows(output, "event") if row["event"] != "checkpoint"]
    assert lives == ["start", "resume", "resume"]


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_the_run_before_the_update(tmp_path, images):
    output = tmp_path / "run"
    enormous = ["--trainer.base_learning_rate", "1e38", "--checkpoint.every_steps", "1"]
    done = finetune(output, images, *enormous, "--checkpoint.asynchronous", "true")
    assert done.returncode == 3
    line = "error: loss or gradient of step 2 is not finite; nothing was updated"
    assert done.stderr.startswith(line) and len(done.stderr.splitlines()) == 1
    assert [row["step"] for row in rows(output, "train")] == [1]
    assert checkpoint.newest(output, warn=pytest.fail).step == 1 and not list(output.glob("*.partial"))


@pytest.mark.slow
def test_zero_stages_give_the_same_losses(tmp_path, images, undisturbed):
    done = finetune(tmp_path / "zero3", images, config="zero3")
    assert done.returncode == 0, done.stdout + done.stderr
    curves = [losses(output) + losses(output, "eval") for output in (tmp_path / "zero3", undisturbed)]
    for mine, other in zip(*curves, strict=True):
        assert mine == pytest.approx(other, abs=1e-5), f"step {mine['step']}"


@pytest.mark.slow
def test_bf16_is_near_fp32(tmp_path, images):
    for steps in ("14", str(STEPS)):
        still = ("--trainer.base_learning_rate", "1e-3", "--trainer.min_learning_rate", str(1e-3 * 8 / 256))  # constant
        options = (*still, "--trainer.max_steps", steps)
        for precision in ("fp32", "bf16"):
            done = finetune(tmp_path / precision, images, *options, "--trainer.precision", precision)
            assert done.returncode == 0, done.stdout + done.stderr
    curves = [losses(tmp_path / name) + losses(tmp_path / name, "eval") for name in ("bf16", "fp32")]
    assert [row["step"] for row in curves[0]] == [*range(1, STEPS + 1), 7, 14, 21, STEPS] and curves[0] != curves[1]
    for mine, other in zip(*curves, strict=True):
        assert mine["loss/class"] == pytest.approx(other["loss/class"], rel=2e-2), f"step {mine['step']}"


@pytest.mark.slow
def test_ranks_give_the_same_losses_where_images_are_not_mixed(tmp_path, images):
    curves = []
    for name, launcher in (("one", PYTHON), ("two", forks(2))):
        done = finetune(tmp_path / name, images, *UNMIXED, launcher=launcher, config="zero3")
        assert done.returncode == 0, done.stdout + done.stderr
        curves.append(losses(tmp_path / name) + losses(tmp_path / name, "eval"))
    for mine, other in zip(*curves, strict=True):
        assert mine == pytest.approx(other, abs=1e-4), f"step {mine['step']}"


@pytest.mark.slow
def test_begins_with_the_encoder_that_two_ranks_pretrained(tmp_path, images):
    sizes = ["--model.image_size", "16", "--model.patch_size", "8", "--trainer.max_steps", "2"]
    neighbours = ["--evals.knn.data", f"fashion-mnist:{images}", "--evals.knn.k", "[5]"]
    done = pretrain(tmp_path / "pretrained", *TOY, *sizes, *neighbours, launcher=forks(2), config=ZERO3)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows(tmp_path / "pretrained", "eval")
    assert 0 <= row["accuracy/knn, class token, k = 5"] <= 1
    still = ["--trainer.max_steps", "1", "--trainer.base_learning_rate", "0", "--trainer.min_learning_rate", "0"]
    init = ["--init", str(tmp_path / "pretrained")]
    done = finetune(tmp_path / "tuned", images, *init, *still)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = SavedState(tmp_path / "pretrained/checkpoint-2"), SavedState(tmp_path / "tuned/checkpoint-1")
    for name, numel in (("cls_token", 32), ("patch_embed.proj.weight", 32 * 192), ("blocks.1.mlp.fc2.weight", 4096)):
        pieces = [state.read(WEIGHT, ParamSlice(f"encoder.{name}", 0), numel) for state in (before, after)]
        assert pieces[0].any() and (pieces[0] == pieces[1]).all(), name
    done = finetune(tmp_path / "other", images, *init, "--model.depth", "3")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: init {tmp_path}/pretrained/checkpoint-2 has another size: depth is 2 there, 3 here; set model.depth"
    ]
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.pool", "cls"], "another model: config.pool is mean there, cls here"),
        (["--model.depth", "3"], "checkpoint-24 is a checkpoint of another model: config.depth is 2 there, 3 here"),
        (["--trainer.global_batch", "16"], "was written with global batch 8, this run has 16"),
        (["--seed", "3"], "was trained with seed 0"),
        (["--data.images", "nowhere"], "nowhere has no folder test, val, validation"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(undisturbed, images, options, message):
    done = finetune(undisturbed, images, *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr
