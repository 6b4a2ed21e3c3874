"""A run that trains on captions says so where its samples have none."""

import pytest
from encoded import one_colour
from train_commands import recipe_of

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import write_tar
from mug.data.kinds.samples import Shape
from mug.data.mixture import StreamConfig, open_stream
from mug.data.stream import BatchShard
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.presets import resolve
from mug.run.training.start import check_captions


class Lines:
    """What a console would show, of one rank."""

    def __init__(self, rank: int):
        self.rank = rank
        self.lines: list[str] = []

    def warn(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Of a run on eight images whose captions have another extension."""
    members = [(f"{i}.{end}", body) for i in range(8) for end, body in (("png", one_colour()), ("blurb", b"a dog"))]
    write_tar(tmp_path / "shard.tar", members)
    train_tokenizer(["a dog"], 512).save(str(tmp_path / "tokenizer.json"))
    values = {
        "shards": tmp_path / "shard.tar",
        "tokenizer": tmp_path / "tokenizer.json",
        "cache": tmp_path,
        "workers": 0,
    }
    return [word for name, value in values.items() for word in (f"--data.{name}", str(value))]


def warnings(arguments: list[str], rank: int = 0) -> list[str]:
    recipe, console = recipe_of("pretrain", *arguments), Lines(rank)
    stream = open_stream({"": StreamConfig(recipe.data)}, 0, Shape(8, 8), BatchShard(4, 4, 0, 1))
    sizes = {"depth": 1, "pixel_depth": 1, "text_unimodal_layers": 1, "text_cross_layers": 1}
    check_captions(MUG(resolve(MUGConfig(**sizes)), recipe.context(stream.source)), stream.source, console)
    return console.lines


def test_where_no_sample_has_a_caption(arguments):
    (line,) = warnings(arguments)
    assert line.startswith("objective mug reads captions, and none of 8 samples read have a caption; the shards have")
    assert "files .png, .blurb: set data.caption to" in line
    assert warnings(arguments, rank=1) == []


def test_not_where_captions_are_named_or_do_not_matter(arguments):
    assert warnings([*arguments, "--data.caption", "blurb"]) == []
    assert warnings([*arguments, "--loss_weights.caption", "0"]) == []
