"""mug.api.train: a list of pairs, trained on by the command of run/pretrain.py."""

import numpy as np
import pytest
import torch
from launch import TOY, losses, pretrain

from mug.api import load, train
from mug.run.common.errors import RunError

OPTIONS = {name.removeprefix("--"): value for name, value in zip(TOY[::2], TOY[1::2], strict=True)}
OPTIONS |= {"trainer.max_steps": 2}


def pairs_of(count: int) -> list[tuple[np.ndarray, str]]:
    """Two grey pictures in turn."""
    return [
        (np.full((24, 32, 3), 90 * (number % 2), np.uint8), ("dark", "light")[number % 2]) for number in range(count)
    ]


@pytest.mark.slow
def test_a_list_trains_as_its_shards_do_and_resumes(tmp_path, capsys):
    output, pairs = tmp_path / "run", pairs_of(40)
    images = [image for image, _ in pairs[:2]]
    first = train(output, pairs, options=OPTIONS).embed(images)
    assert "step 2  loss/total" in capsys.readouterr().out

    made = output / "pairs"
    data = ["--data.shards", f"{made}/train-*.tar", "--data.held_out", f"{made}/held_out-*.tar"]
    data += ["--data.tokenizer", f"{made}/tokenizer.json", "--trainer.max_steps", "2"]
    done = pretrain(tmp_path / "by_hand", *TOY, *data, config="ds_configs/zero1.json")
    assert done.returncode == 0, done.stderr
    assert losses(output) == losses(tmp_path / "by_hand")
    assert torch.equal(load(tmp_path / "by_hand").embed(images), first)

    assert torch.equal(train(output, pairs, options=OPTIONS).embed(images), first)
    assert "step 2 was the last one" in capsys.readouterr().out
    with pytest.raises(
        RunError, match=r"training ended with status 2: the checkpoint's data has samples 37, this run's has 36"
    ):
        train(output, pairs_of(39), options=OPTIONS)
    assert torch.equal(load(output).embed(images), first)
