"""A replay bundle comes back from its file as it was, and is JSON that anybody can read."""

import dataclasses
import json
import math

import pytest
from train_commands import recipe_of

from mug.run.common.errors import RunError
from mug.run.state import replay_bundle as bundle
from mug.run.state.replay_bundle import Bundle, MicroBatch
from mug.run.training.recipe import Recipe

LOSSES = {"pixels": 1.2127140760421753, "caption": math.nan}, {"pixels": math.inf, "caption": -math.inf}


def test_it_comes_back_as_it_was(tmp_path):
    recipe = recipe_of("pretrain", "--data.shards", "a.tar")
    ran = [MicroBatch(rank, (16 + rank, 24, 2), losses) for rank, losses in enumerate(LOSSES)]
    written = Bundle(3, "checkpoint-2", "x.json", 2, 3, dataclasses.asdict(recipe), ran, {"torch": "2"})
    path = bundle.write(tmp_path, written)
    assert path == tmp_path / "replay" / "step-3.json"
    json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    back = bundle.read(path)
    assert repr(back.micro_batches) == repr(ran)
    assert dataclasses.replace(back, micro_batches=[], recipe={}) == dataclasses.replace(
        written, micro_batches=[], recipe={}
    )
    again = json.dumps(dataclasses.asdict(Recipe.from_dict(back.recipe)))
    assert again == json.dumps(dataclasses.asdict(recipe))


def test_a_micro_batch_names_its_samples():
    assert str(MicroBatch(1, (21, 25, 2), {})) == "rank 1, positions 21 to 23 by 2"
    assert str(MicroBatch(0, (8, 12, 1), {})) == "rank 0, positions 8 to 11"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "step": 3}'])
def test_what_is_no_bundle_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RunError, match=r"x\.json"):
        bundle.read(tmp_path / "x.json")
