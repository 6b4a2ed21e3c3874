"""run/generate.py on a checkpoint of a short run, with the inputs that users give it."""

import re
import subprocess
from types import SimpleNamespace

import pytest
from commands import run_script
from launch import TOY, deepspeed, environment, pretrain
from PIL import Image

from mug.data.config import DataConfig
from mug.run.generate import read_inputs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks under ZeRO-3: its weights lie in two shards."""
    output = tmp_path_factory.mktemp("generate") / "run"
    done = pretrain(output, *TOY, "--trainer.max_steps", "2", launcher=deepspeed(2))
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def generate(*arguments: object) -> subprocess.CompletedProcess:
    return run_script("run/generate.py", *arguments, env=environment())


@pytest.mark.slow
def test_held_out_pairs_by_default(run, tmp_path):
    done = generate(run, "--out", tmp_path, "--limit", "3", "--beams", "2")
    assert done.returncode == 0, done.stderr
    assert "held out: loss/total" in done.stdout
    assert done.stdout.splitlines()[-2:] == [str(tmp_path / "generated.png"), str(tmp_path / "generated.html")]
    page = (tmp_path / "generated.html").read_text()
    assert page.count("<article>") == 3
    assert len(re.findall(r'<img alt="(?:original|masked|reconstruction)" src="data:image/png;base64,', page)) == 9
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must need no other file"
    assert page.count("<dt>written, 2 beams</dt>") == 3 and page.count("<dt>true</dt>") == 3
    assert Image.open(tmp_path / "generated.png").height > 3 * 128
    assert Image.open(tmp_path / "hero.png").width == 720


@pytest.mark.slow
def test_image_files_and_one_checkpoint(run, tmp_path):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.jpg")
    done = generate(run / "checkpoint-2", tmp_path / "photo.jpg", "--out", tmp_path / "out", "--beams", "1")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "generated.html").read_text()
    assert page.count("<article>") == 1 and "<dt>true</dt>" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["{run}", "missing.jpg"], "missing.jpg: no such file"),
        (["{run}", "docs"], "docs is a folder; give the images or shards in it, as docs/*"),
        (["{run}", "README.md"], "README.md"),
        (["nowhere"], "nowhere does not hold a checkpoint"),
        (["{run}", "--beams", "0"], "--beams"),
        (["{run}", "--bems", "2"], "--bems"),
    ],
    ids=["missing file", "a folder", "no image", "no checkpoint", "no beams", "unknown flag"],
)
def test_a_mistake_is_one_line(run, tmp_path, arguments, names):
    done = generate(*(argument.format(run=run) for argument in arguments), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and names in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_cameras_ending_in_capitals_is_an_image(tmp_path):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "DSC1.JPG", "JPEG")
    options = SimpleNamespace(inputs=[str(tmp_path / "DSC1.JPG")], cache=str(tmp_path), limit=4)
    (image,), (caption,) = read_inputs(options, DataConfig(), 16)
    assert image.shape == (3, 16, 16) and (image[0] > 250).all() and caption == ""
