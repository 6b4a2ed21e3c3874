"""Shards as the real img2dataset writes them, downloading over HTTP from this machine: read, and trained on.

It lives in an environment of its own, because it pins webdataset < 0.3.
"""

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from launch import ROOT, TOY, environment, losses, pretrain
from PIL import Image

from mug.data.config import DataConfig
from mug.data.kinds.pairs import open_held_out
from mug.data.kinds.samples import Shape

COUNT = 30  # pairs that can be downloaded; one more is missing, and one is no image
IMG2DATASET = "img2dataset==1.47.0"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def image_of(i: int) -> Image.Image:
    noise = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((120, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> Path:
    """A Parquet of the URLs and captions that a server on this machine serves while the tests run."""
    folder = tmp_path_factory.mktemp("www")
    names = [f"{i}.{'png' if i % 2 else 'jpg'}" for i in range(COUNT)]
    for i, name in enumerate(names):
        image_of(i).save(folder / name)
    (folder / "page.jpg").write_text("<html>")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    names += ["missing.jpg", "page.jpg"]
    table = {"url": [f"{base}/{name}" for name in names], "caption": [f"picture {i} of 30" for i in range(len(names))]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "urls.parquet")
    yield folder / "urls.parquet"
    server.shutdown()


@pytest.fixture(scope="module")
def download(urls, tmp_path_factory):
    """Function (output format) → folder of what img2dataset made of the URLs, in shards of 12."""
    venv = tmp_path_factory.mktemp("img2dataset")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run(
        [f"{venv}/bin/pip", "install", "--quiet", "--no-compile", "--retries", "10", IMG2DATASET], check=True
    )

    def download(format: str) -> Path:
        out = tmp_path_factory.mktemp(format)
        options = {
            "url_list": urls, "input_format": "parquet", "url_col": "url", "caption_col": "caption",
            "output_format": format, "output_folder": out, "number_sample_per_shard": 12, "image_size": 64,
            "resize_mode": "keep_ratio", "processes_count": 1, "thread_count": 4, "enable_wandb": False,
        }  # fmt: skip
        command = [f"{venv}/bin/img2dataset", *(f"--{name}={value}" for name, value in options.items())]
        variables = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # or it asks a server for its latest version
        subprocess.run(command, env=variables, check=True, capture_output=True)
        return out

    yield download
    shutil.rmtree(venv)  # 0.8 GB, which pytest would keep


@pytest.fixture(scope="module")
def tars(download) -> Path:
    return download("webdataset")


@pytest.fixture(scope="module")
def tokenizer(tars) -> Path:
    """Trained on the captions of the tars."""
    command = [sys.executable, "run/train_tokenizer.py", f"{tars}/*.tar", "--out", f"{tars}/tokenizer.json"]
    done = subprocess.run(
        [*command, "--vocabulary", "600"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return tars / "tokenizer.json"


def members(tars: Path) -> dict[str, dict[str, bytes]]:
    """key → extension → contents, by the standard library; keys in the order of the shards."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


@pytest.mark.slow
def test_our_reader_sees_what_lies_in_the_tars(tars, tokenizer):
    shards = f"{tars}/{{00000..00002}}.tar"
    pairs = open_held_out(DataConfig(shards=shards, held_out=shards, tokenizer=str(tokenizer)), Shape(32, 16))
    stats = [json.loads(path.read_text()) for path in sorted(tars.glob("*_stats.json"))]
    assert len(pairs) == COUNT == sum(one["successes"] for one in stats) == sum(one["count"] for one in stats) - 2
    expected = members(tars)
    assert len(expected) == COUNT
    for position, sample in enumerate(expected.values()):
        number = int(sample["txt"].split()[1])
        batch, _ = pairs.batch([position])
        assert pairs.tokenizer.decode(batch["tokens"][0]) == f"picture {number} of 30"
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        assert image.size == (96, 64)
        source = np.asarray(image_of(number).resize((32, 32), Image.Resampling.BICUBIC, box=(20, 0, 100, 80)), np.int16)
        view = batch["image"][0].permute(1, 2, 0).to(torch.int16).numpy()
        assert np.abs(view - source).mean() < 8  # two JPEGs and two resizes lie between


@pytest.mark.slow
def test_its_parquet_becomes_the_same_pairs(download, tars, tmp_path):
    parquet = download("parquet")
    command = [sys.executable, "run/build_shards.py", "parquet", str(parquet), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--held_out", "0"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} pairs, {COUNT} with a caption; left out: 2 images that cannot be used" in done.stdout
    built, expected = members(tmp_path / "out"), members(tars)
    assert {key: (pair["jpg"], pair["txt"]) for key, pair in built.items()} == {
        key: (pair["jpg"], pair["txt"]) for key, pair in expected.items()
    }
    for key, pair in built.items():
        ours, theirs = json.loads(pair["json"]), json.loads(expected[key]["json"])
        assert ours["url"] == theirs["url"] and ours["sha256"] == theirs["sha256"]


@pytest.mark.slow
def test_they_are_trained_on(tars, tokenizer, tmp_path):
    data = ("--data.shards", f"{tars}/*.tar", "--data.tokenizer", str(tokenizer))
    done = pretrain(tmp_path / "run", *TOY, *data, "--trainer.max_steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = losses(tmp_path / "run")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(np.isfinite(row["loss/total"]) and row["loss/caption"] > 0 for row in steps)
