"""Segmentation: views against the images they come from, metrics against scikit-learn, runs as users start them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run_script
from PIL import Image
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex
from train_commands import DEEPSPEED, recipe_of

from mug.data.errors import DataError
from mug.data.kinds.scenes import MEAN, SceneConfig, Scenes, augment, choose_crop, distorted, open_scenes
from mug.model.objectives.segment import SegmentConfig
from mug.model.presets import resolve
from mug.run.evaluators.segmentation import metrics_of, places, slide
from mug.run.training.loop import schedule_of

ROOT = Path(__file__).parents[2]
ADE20K = "run/recipes/segment/ade20k_base.yaml"
PLAIN = SceneConfig(flip=False, distort=False, scale=(1.0, 1.0), cat_max_ratio=1.0)


# --- The recipe --------------------------------------------------------------------------------------------


def test_the_ade20k_recipe_is_mmsegmentations():
    recipe = recipe_of("segment", "--config", str(ROOT / ADE20K))
    model, trainer, data = recipe.model, recipe.trainer, recipe.data
    assert (model.image_size, data.classes, model.channels, model.drop_path) == (512, 150, 768, 0.1)
    assert (model.width, model.depth, model.patch_size) == (768, 12, 16)
    assert trainer.learning_rate == pytest.approx(1e-4)
    assert (trainer.layer_decay, trainer.weight_decay, trainer.gradient_clipping) == (0.65, 0.05, 0)
    assert (trainer.global_batch, trainer.max_steps, tuple(trainer.betas)) == (16, 160_000, (0.9, 0.999))
    assert (data.scale, data.cat_max_ratio, data.reduce_zero_label) == ((0.5, 2.0), 0.75, True)
    assert recipe.loss_weights == {"segments": 1.0, "auxiliary": 0.4}
    schedule = schedule_of(trainer, trainer.max_steps)
    rates = [schedule(step * 16) for step in (750, 1500, 80_750, 160_000)]
    assert rates == pytest.approx([0.5e-4, 1e-4, 0.5e-4, 0])


# --- Views -------------------------------------------------------------------------------------------------


def mosaic(height: int = 60, width: int = 90) -> tuple[Image.Image, np.ndarray]:
    """Blocks of 15 px of one grey each, and labels that say which: grey = 40 label + 20."""
    labels = np.random.default_rng(0).integers(0, 6, (height // 15, width // 15)).repeat(15, 0).repeat(15, 1)
    return Image.fromarray((40 * labels + 20).astype(np.uint8)).convert("RGB"), labels.astype(np.uint8)


@pytest.mark.parametrize("seed", range(8))
def test_labels_go_where_their_pixels_go(seed):
    image, labels = mosaic()
    config = SceneConfig(scale=(0.5, 2.0), flip=True, distort=False, cat_max_ratio=0.9)
    draws = np.random.default_rng(seed).random(30)
    view, seen = augment(image, labels, 48, config, draws)
    assert view.shape == (3, 48, 48) and view.dtype == np.uint8 and seen.shape == (48, 48)
    counted = seen != 255
    side = round((0.5 + 1.5 * draws[0]) * 48)
    assert counted.sum() == min(side, 48) * min(round(side * 1.5), 48)
    off = np.abs(view[0].astype(int) - (40 * seen.astype(int) + 20))[counted]
    assert np.median(off) == 0 and (off > 30).mean() < 0.12, "but for seams, where pixels are mixed"
    assert (view[:, ~counted].T == MEAN).all()


def test_a_view_that_changes_nothing_is_the_image():
    image, labels = mosaic(60, 60)
    view, seen = augment(image, labels, 60, PLAIN, np.full(30, 0.5))
    assert np.array_equal(view.transpose(1, 2, 0), np.asarray(image)) and np.array_equal(seen, labels)
    mirrored = augment(
        image, labels, 60, SceneConfig(scale=(1.0, 1.0), distort=False), np.array([0.5, 0.1] + [0.5] * 28)
    )
    assert np.array_equal(mirrored[0], view[..., ::-1]) and np.array_equal(mirrored[1], labels[:, ::-1])


def test_crops_of_almost_one_class_are_drawn_again():
    labels = np.zeros((10, 40), np.uint8)
    labels[:, 25:] = 1
    draws = np.array([[0.0, 0.0], [0.3, 0.0], [0.65, 0.0], [0.99, 0.0]])
    boxes = [choose_crop(labels, 10, share, draws) for share in (0.5001, 0.999, 0.1)]
    assert [box[0] for box in boxes] == [20, 20, 30], "half and half; any two; none, so the last that was tried"
    labels[:, :] = 255
    assert choose_crop(labels, 10, 0.75, draws)[0] == 30


def test_colours_change_only_where_asked():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    never, middle = np.full((4, 2), 0.9), np.array([[0.1, 0.5]] * 4)  # the middle of each range changes nothing
    assert torch.equal(distorted(image, never), image)
    assert (distorted(image, middle).int() - image.int()).abs().max() <= 2
    brighter = distorted(image, np.array([[0.1, 1.0], *never[1:].tolist()]))
    assert torch.equal(brighter, (image.int() + 32).clamp(max=255).to(torch.uint8))
    grey = image.float() @ torch.eye(8)  # contrast 0.5: half of the way to the mean grey
    low = distorted(image, np.array([never[0].tolist(), [0.1, 0.0], *never[2:].tolist()]))
    mean = (0.2989 * grey[0] + 0.587 * grey[1] + 0.114 * grey[2]).mean()
    assert (low.float() - (image.float() + mean) / 2).abs().max() <= 1.5


# --- Files -------------------------------------------------------------------------------------------------


def write_scenes(folder: Path, count: int = 6, classes: int = 3) -> None:
    """Squares of one colour a class; the class decides the colour."""
    random = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = random.integers(0, classes, (4, 5)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
            Image.fromarray((100 * labels).astype(np.uint8)).convert("RGB").save(folder / f"images/{split}/{i}.png")
            Image.fromarray(labels).save(folder / f"annotations/{split}/{i}.png")


def test_zero_may_mean_unlabelled(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 1], [150, 255]], np.uint8)).save(tmp_path / "b.png")
    scenes = Scenes([tmp_path / "a.png"], [tmp_path / "b.png"], 150, True)
    assert scenes.read(0)[1].tolist() == [[255, 0], [149, 255]]
    with pytest.raises(DataError, match=r"b\.png: class 150 is out of range, data\.classes is 150"):
        Scenes(scenes.images, scenes.annotations, 150, False).read(0)


def test_what_is_wrong_with_the_files_is_reported(tmp_path):
    write_scenes(tmp_path / "data")
    options = SceneConfig(folder=str(tmp_path / "data"), classes=3)
    scenes = open_scenes(options, "training")
    assert len(scenes) == 6
    Image.new("RGB", (3, 3)).save(scenes.images[0])
    with pytest.raises(DataError, match="one byte for each of the image's 3 x 3 pixels"):
        scenes.read(0)
    scenes.images[1].write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1\.png or its annotation cannot be read"):
        scenes.read(1)
    scenes.annotations[2].unlink()
    with pytest.raises(DataError, match=r"2\.png is missing \(1 of 6"):
        open_scenes(options, "training")
    with pytest.raises(DataError, match="nowhere/images/training does not hold images"):
        open_scenes(SceneConfig(folder="nowhere"), "training")


def test_scenes_of_every_format_in_folders_and_links_are_found_and_the_rest_is_counted(tmp_path, caplog):
    write_scenes(tmp_path / "data", 2)
    images, annotations = (tmp_path / "data" / kind / "training" for kind in ("images", "annotations"))
    options = SceneConfig(folder=str(tmp_path / "data"), classes=3)
    plain = [path.name for path in open_scenes(options, "training").images]
    assert plain == ["0.png", "1.png"] and caplog.messages == []
    Image.open(images / "0.png").save(images / "2.BMP", "BMP")
    (annotations / "2.PNG").write_bytes((annotations / "0.png").read_bytes())
    for inside in (images, annotations):
        (inside / "city").symlink_to(tmp_path / "data" / inside.parent.name / "validation")
        (inside / ".ipynb_checkpoints").mkdir()
    (annotations / "9.png").write_bytes((annotations / "0.png").read_bytes())
    (images / "readme.md").write_text("")
    scenes = open_scenes(options, "training")
    names = [str(path.relative_to(images)) for path in scenes.images]
    assert names == ["0.png", "1.png", "2.BMP", "city/0.png", "city/1.png"]
    assert np.array_equal(scenes.read(2)[1], scenes.read(0)[1]) and scenes.read(4)[0].size == (50, 40)
    (line,) = caplog.messages
    for part in ("2 hidden folders", "1 files that are not images", "1 annotations without an image"):
        assert part in line


# --- Metrics -----------------------------------------------------------------------------------------------


def test_mean_iou_is_scikit_learns_and_torchmetrics():
    random = np.random.default_rng(0)
    true = random.choice(5, p=[0.5, 0.2, 0.2, 0.1, 0.0], size=4000)  # class 4 never occurs
    said = np.where(random.random(4000) < 0.6, true, random.integers(0, 4, 4000))
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    np.add.at(matrix.numpy(), (true, said), 1)
    metrics = metrics_of(matrix)
    assert metrics["mean IoU/segments"] == pytest.approx(jaccard_score(true, said, average="macro"))
    theirs = MulticlassJaccardIndex(5)(torch.from_numpy(said), torch.from_numpy(true)).item()
    assert metrics["mean IoU/segments"] == pytest.approx(theirs, abs=1e-6)
    assert metrics["accuracy/segments"] == pytest.approx((true == said).mean())
    one = np.full_like(true, 0)
    assert metrics["mean IoU/commonest class"] == pytest.approx(jaccard_score(true, one, average="macro"))


def test_windows_cover_the_image_and_agree():
    assert list(places(96, 96)) == [0] and list(places(100, 96)) == [0, 4]
    assert list(places(300, 96)) == [0, 64, 128, 192, 204]
    config = resolve(SegmentConfig("tiny", image_size=16))
    pointwise = SimpleNamespace(config=config, classes=3, logits=lambda image: image.float() ** 2)
    image = torch.randint(0, 256, (1, 3, 16, 53), dtype=torch.uint8)
    torch.testing.assert_close(slide(pointwise, image), image[0].float() ** 2)


# --- Runs --------------------------------------------------------------------------------------------------

TOY = ["--model.preset", "tiny", "--model.image_size", "32", "--model.width", "16", "--model.heads", "2"]
TOY += ["--data.classes", "3", "--model.channels", "8", "--model.drop_path", "0.3", "--trainer.max_steps", "6"]
TOY += ["--trainer.global_batch", "4", "--trainer.groups", "2", "--trainer.micro_batch", "2"]
TOY += ["--trainer.log_every", "1", "--trainer.eval_every", "6", "--checkpoint.every_steps", "2", "--data.workers", "0"]


def command(output: Path, folder: Path, *options: str) -> list[str]:
    places = ["--output", str(output), "--data.folder", str(folder)]
    return [sys.executable, "run/segment.py", *DEEPSPEED, *TOY, *places, *options]


def start(*arguments) -> subprocess.CompletedProcess:
    return run_script(*command(*arguments)[1:])


def rows(output: Path) -> list[dict]:
    """Of training and evaluations, without what depends on the clock."""
    clock = ("images_per_s", "data_wait", "memory_gb", "goodput", "tflops", "mfu")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in lines if row["kind"] != "event"]
    return [{name: value for name, value in row.items() if name not in clock} for row in kept]


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_metrics_to_the_digit(tmp_path):
    write_scenes(tmp_path / "data")
    done = start(tmp_path / "whole", tmp_path / "data")
    assert done.returncode == 0, done.stdout + done.stderr
    killed = subprocess.Popen(command(tmp_path / "cut", tmp_path / "data"), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "checkpoint-2").exists():
        assert killed.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start(tmp_path / "cut", tmp_path / "data").returncode == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6, 6]
    assert 0 <= rows(tmp_path / "cut")[-1]["mean IoU/segments"] <= 1
    again = start(tmp_path / "whole", tmp_path / "data")
    assert again.returncode == 0 and "step 6 was the last one" in again.stdout
    faster = start(tmp_path / "whole", tmp_path / "data", "--trainer.base_learning_rate", "0.1")
    assert faster.returncode == 2 and "trained with trainer.base_learning_rate 0.064 (now 0.1)" in faster.stderr
    other = start(tmp_path / "whole", tmp_path / "data", "--model.channels", "16")
    assert other.returncode == 2 and "config.channels is 8 there, 16 here" in other.stderr


@pytest.mark.slow
def test_bf16_is_near_fp32(tmp_path):
    write_scenes(tmp_path / "data")
    curves = []
    for precision in ("bf16", "fp32"):
        done = start(tmp_path / precision, tmp_path / "data", "--trainer.precision", precision)
        assert done.returncode == 0, done.stdout + done.stderr
        curves.append([row["loss/total"] for row in rows(tmp_path / precision) if row["kind"] == "train"])
    assert len(curves[0]) == 6 and curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)


@pytest.mark.slow
def test_two_ranks_and_two_groups_give_the_curve_of_one_rank(tmp_path):
    """Batch norms see a group: 4 images of one rank, or 2 of each of two; and 2 at once where there are two groups."""
    write_scenes(tmp_path / "data")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    curves = {}
    for name, ranks, options in (
        ("one rank", 1, ["--trainer.micro_batch", "4", "--trainer.groups", "1"]),
        ("two ranks", 2, ["--trainer.groups", "1"]),
        ("two groups", 1, []),
        ("two groups on two ranks", 2, ["--trainer.micro_batch", "1"]),
    ):
        line = command(tmp_path / name, tmp_path / "data", *options)
        line = [*launcher, *line[1:]] if ranks == 2 else line
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        curves[name] = [row["loss/total"] for row in rows(tmp_path / name) if row["kind"] == "train"]
    assert curves["two ranks"] == pytest.approx(curves["one rank"], abs=1e-4)
    assert curves["two groups on two ranks"] == pytest.approx(curves["two groups"], abs=1e-4)
    assert curves["two groups"] != pytest.approx(curves["one rank"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--data.classes", "2", "--data.workers", "1"], "data.classes is 2"),
        (["--trainer.global_batch", "5"], "trainer.groups 2 does not divide trainer.global_batch 5"),
        (["--trainer.layer_decay", "0"], "trainer.layer_decay"),
        (["--trainer.layer_deca", "1"], "layer_deca"),
        (["--trainer.groups", "1"], "set trainer.groups 2, or a larger trainer.micro_batch"),
        (["--model.drop_path", "1"], "model.drop_path must be at least 0 and less than 1"),
        (["--init", "nowhere"], "init nowhere"),
        (["--model.depth", "3"], "model.depth must be at least 4, not 3"),
        (["--data.folder", "nowhere"], "nowhere/images/training"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_mistake_is_one_line(tmp_path, options, names):
    write_scenes(tmp_path / "data")
    done = start(tmp_path / "run", tmp_path / "data", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and names in lines[0]
