"""Every objective that embeds pairs learns to name what it sees: tokenizer, training, checkpoint and evaluation agree.

Shards of a few classes, of which each image is a drawing of OpenMoji at a place and size of its own, on a colour of its
own. All objectives: python tests/end_to_end/test_zero_shot_run.py
"""

import io
import random
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from launch import pretrain, rows
from PIL import Image

from mug.data.builders.openmoji import drawings
from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import Sample, write_tar_shard
from mug.model.objectives.objective import find_objective, objective_names
from mug.run.training.recipe import RECIPES

CLASSES = {"1F34E": "red apple", "1F6B2": "bicycle", "1F511": "key", "1F3B8": "guitar", "1F335": "cactus"}
CLASSES |= {"1F680": "rocket", "1F40D": "green snake", "1F4D5": "closed book", "1F41F": "fish", "2602": "umbrella"}
TEMPLATES = ("a drawing of a {}", "{} on a plain background", "here is a {}")
SIDE, TRAINING, TEST = 32, 80, 10  # pixels; images of each class
NAMES = [name for name in objective_names() if hasattr(find_objective(name), "embed_text")]


def picture(drawing: Image.Image, draw: random.Random) -> Image.Image:
    side = draw.randrange(26, 31)
    small = drawing.resize((side, side), Image.Resampling.BOX)
    image = Image.new("RGB", (SIDE, SIDE), tuple(draw.randrange(200, 256) for _ in range(3)))
    image.paste(small, (draw.randrange(SIDE - side + 1), draw.randrange(SIDE - side + 1)), small)
    return image


def build(folder: Path) -> None:
    """Writes training and held-out shards, a tokenizer, and a folder for each class of other images to name."""
    import resvg_py

    draw, samples, held_out = random.Random(0), [], []
    for key, name in CLASSES.items():
        drawing = resvg_py.svg_to_bytes(svg_path=str(drawings() / f"{key}.svg"), width=64, height=64)
        drawing = Image.open(io.BytesIO(bytes(drawing))).convert("RGBA")
        (folder / "test" / name.replace(" ", "_")).mkdir(parents=True)
        for i in range(TRAINING):
            buffer = io.BytesIO()
            picture(drawing, draw).save(buffer, "PNG")
            caption = draw.choice(TEMPLATES).format(name)
            samples.append(Sample(f"{key}-{i}", buffer.getvalue(), "png", caption, {"key": f"{key}-{i}"}))
        held_out.append(samples.pop())
        for i in range(TEST):
            picture(drawing, draw).save(folder / "test" / name.replace(" ", "_") / f"{i}.png")
    draw.shuffle(samples)
    write_tar_shard(folder / "train-0.tar", samples)
    write_tar_shard(folder / "held_out-0.tar", held_out)
    tokenizer = train_tokenizer([sample.caption for sample in samples], 512)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def recipe_of(name: str) -> dict:
    """The recipe of the objective's embedded default; of UniX², what its embeddings are learned by."""
    (path,) = (path for path in (RECIPES / name).glob("*.yaml") if path.stem in ("tiny", f"openmoji_{name}"))
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "pairs" in recipe["data"]:
        weights = dict.fromkeys(find_objective(name).losses, 0.0) | {"cmcl": 1.0}
        recipe |= {"data": {"crop_scale": [1.0, 1.0], "flip": False}, "loss_weights": weights}
    return recipe


def accuracy(name: str, folder: Path) -> float:
    """Of a short run of the objective's recipe, on images that it has not seen."""
    recipe = recipe_of(name)
    recipe["model"] |= {"image_size": SIDE, "patch_size": 8, "depth": 2, "width": 64, "heads": 2}
    recipe["model"] |= {"text_length": 16, "text_width": 64, "text_heads": 2}
    recipe["data"] |= {"shards": str(folder / "train-0.tar"), "held_out": str(folder / "held_out-0.tar")}
    recipe["data"] |= {"tokenizer": str(folder / "tokenizer.json"), "workers": 0}
    recipe["trainer"] |= {"global_batch": 64, "groups": 1, "micro_batch": 64, "base_learning_rate": 1.2e-2}
    recipe["trainer"] |= {"max_steps": 400, "warmup_samples": 640, "eval_every": 400, "log_every": 50}
    recipe["evals"] = {"zero_shot": {"data": str(folder / "test"), "templates": ["a drawing of a {}", "here is a {}"]}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run = pretrain(folder / name, "--config", str(path), config="ds_configs/zero1.json")
    assert run.returncode == 0, run.stderr
    return rows(folder / name, "eval")[-1]["accuracy/zero shot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    build(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_images_are_named_without_a_label(name, folder):
    assert accuracy(name, folder) > 0.9


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary))
        for each in sys.argv[1:] or NAMES:
            sys.stdout.write(f"{each}: {accuracy(each, Path(temporary)):.3f}\n")
