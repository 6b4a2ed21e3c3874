"""A user's mistake ends with one line that names it, status 2, and nothing written."""

import json
import socket

import pytest
from launch import ROOT, TOY, pretrain


def config_with(tmp_path, *path: str) -> str:
    """A copy of zero3.json with an unknown key at `path`."""
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = 1
    copy = tmp_path / "config.json"
    copy.write_text(json.dumps(config))
    return str(copy)


CASES = {
    "unknown recipe key": (["--trainer.learning_rat", "1"], "trainer.learning_rat"),
    "abbreviated flag": (["--conf", "run/recipes/mug/cc3m_base.yaml"], "--conf"),
    "number out of range": (["--trainer.max_steps", "0"], "trainer.max_steps must be at least 1"),
    "unknown flag": (["--frobnicate", "1"], "frobnicate"),
    "wrong type": (["--trainer.max_steps", "many"], "max_steps"),
    "batch that does not divide": (["--trainer.global_batch", "10", "--trainer.micro_batch", "4"], "global batch 10"),
    "missing tokenizer": (["--data.shards", "nowhere/*.tar", "--data.tokenizer", "t.json"], "'t.json' does not exist"),
    "missing shards": (
        ["--config", "run/recipes/mae/openmoji_mae.yaml", "--data.shards", "nowhere/*.tar"],
        "nowhere/*.tar",
    ),
    "image not a multiple of the patch": (["--model.image_size", "60"], "model.image_size 60"),
    "unknown preset": (["--model.preset", "giant"], "giant"),
    "unknown loss": (["--loss_weights", "{pixels: 1, captions: 1}"], "captions"),
    "no loss with a weight": (["--loss_weights", "{pixels: 0, caption: 0}"], "loss_weights are all 0"),
    "no apex": (["--trainer.apex_adam", "true"], "trainer.apex_adam: apex.optimizers cannot be imported"),
    "a number that is none": (["--trainer.gradient_clipping", ".nan"], "trainer.gradient_clipping is nan"),
    "missing recipe": (["--config", "nothing.yaml"], "nothing.yaml"),
}


def assert_refused(done, names: str, output) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and names in lines[0], done.stderr
    assert done.stdout == ""
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_mistake_on_the_command_line(tmp_path, case):
    options, names = CASES[case]
    options = options if "--config" in options else [*TOY, *options]
    assert_refused(pretrain(tmp_path / "run", *options), names, tmp_path / "run")


@pytest.mark.slow
def test_a_language_that_no_pair_has(tmp_path):
    done = pretrain(tmp_path / "run", *TOY, "--data.language", "xx")  # which may index the pairs first, and say so
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: data.language is 'xx', but none of 1,000 captioned pairs")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_help_is_printed(tmp_path):
    done = pretrain(tmp_path / "run", "--help")
    assert done.returncode == 0
    assert "--trainer.max_steps" in done.stdout and "optimizer steps of the run" in done.stdout


@pytest.mark.slow
def test_unknown_key_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: tiny}\ntrainer: {max_step: 3}\n")
    assert_refused(pretrain(tmp_path / "run", "--config", str(recipe)), "max_step", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [("zero_optimisation",), ("zero_optimization", "overlap_com"), ("optimizer", "params", "beta"), ("bf16", "on")],
    ids=".".join,
)
def test_unknown_key_in_the_deepspeed_json(tmp_path, path):
    done = pretrain(tmp_path / "run", *TOY, config=config_with(tmp_path, *path))
    assert_refused(done, ".".join(path), tmp_path / "run")


@pytest.mark.slow
def test_output_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    done = pretrain(file / "run", *TOY)
    assert_refused(done, str(file), file / "run")
    assert file.read_text() == "not a folder"


@pytest.mark.slow
def test_another_program_listens_where_rank_zero_should(tmp_path, monkeypatch):
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
        for name, value in {**place, "LOCAL_WORLD_SIZE": "2", "MUG_RENDEZVOUS_SECONDS": "2"}.items():
            monkeypatch.setenv(name, value)
        done = pretrain(tmp_path / "run", *TOY)
    assert_refused(done, f"cannot reach 127.0.0.1:{port}; ", tmp_path / "run")
