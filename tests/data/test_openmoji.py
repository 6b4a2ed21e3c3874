"""The embedded default, built for real: once by two processes at the same time, once after a kill."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mug.data.builders import openmoji
from mug.data.config import DataConfig
from mug.data.kinds.pairs import open_held_out, open_train
from mug.data.kinds.samples import Shape
from mug.data.reader import Reader
from mug.data.tokenizer import Tokenizer


def start_build(cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mug.data.builders.openmoji", "--cache", str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache folder filled by two processes that began together."""
    cache = tmp_path_factory.mktemp("cache")
    builders = [start_build(cache) for _ in range(2)]
    outputs = [builder.communicate() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert outputs[0][0] == outputs[1][0]  # the paths
    assert sum("building" in stderr for _, stderr in outputs) == 1
    return cache


@pytest.fixture(scope="module")
def folder(cache) -> Path:
    return openmoji.ensure_openmoji(cache)


def samples(folder: Path, split: str) -> list[dict]:
    return list(webdataset.WebDataset([str(p) for p in sorted(folder.glob(f"{split}-*.tar"))], shardshuffle=False))


@pytest.mark.slow
def test_the_folder_holds_what_it_says_and_nothing_else(cache, folder):
    shards = [f"train-{i:05d}.tar" for i in range(4)]
    assert {p.name for p in folder.iterdir()} == {"LICENSE.txt", "tokenizer.json", "held_out-00000.tar", *shards}
    assert sorted(p.name for p in cache.iterdir()) == [folder.name, "openmoji.lock"]
    assert "CC BY-SA 4.0" in (folder / "LICENSE.txt").read_text()


@pytest.mark.slow
def test_every_pair_as_webdataset_reads_it(folder):
    train, held_out = samples(folder, "train"), samples(folder, "held_out")
    keys = [s["__key__"] for s in train], [s["__key__"] for s in held_out]
    assert len(set(keys[0]) | set(keys[1])) == len(train) + len(held_out) == 3953
    assert 0.08 < len(held_out) / 3953 < 0.12
    for key in keys[1][:50]:
        assert int(hashlib.sha256(key.encode()).hexdigest(), 16) < 0.1 * 2**256
    for sample in [*train[::200], *held_out[::50]]:
        meta = json.loads(sample["json"])
        assert meta["caption"] == sample["txt"].decode() == meta["captions"]["en"]
        assert not {":", "_"} & set(meta["caption"])
        assert "".join(f"-{ord(c):04X}" for c in meta["emoji"])[1:] == meta["hexcode"] == sample["__key__"]
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.size == (meta["width"], meta["height"]) == (128, 128)
        assert np.asarray(image.convert("RGBA"))[0, 0].tolist() == [255, 255, 255, 255]


@pytest.mark.slow
def test_known_pairs(folder):
    by_key = {s["__key__"]: s for s in samples(folder, "train") + samples(folder, "held_out")}
    wave = json.loads(by_key["1F44B-1F3FD"]["json"])
    assert wave["caption"] == "waving hand medium skin tone"
    assert wave["captions"]["de"] == "winkende hand mittlere hautfarbe"
    assert (wave["group"], wave["status"]) == ("1F44B", "fully_qualified")
    assert len(wave["captions"]) == 14
    red, blue = (Image.open(io.BytesIO(by_key[key]["png"])).convert("RGB") for key in ("1F7E5", "1F7E6"))
    assert np.argmax(red.getpixel((64, 64))) == 0 and np.argmax(blue.getpixel((64, 64))) == 2  # the squares


@pytest.mark.slow
def test_our_reader_reads_the_same(folder, tmp_path):
    for split in ("train", "held_out"):
        reader = Reader.open(f"{folder}/{split}-*.tar", DataConfig(cache=str(tmp_path)))
        for place, sample in zip(reader.spread(10**6), samples(folder, split), strict=True):
            assert reader.index.key(*place) == sample["__key__"]
            assert reader.read(*place) == (sample["png"], sample["txt"], sample["json"])


@pytest.mark.slow
def test_the_tokenizer_knows_the_captions(folder):
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.vocab_size, tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask) == (2048, 0, 1, 2, 3)
    unknown = tokenizer.backend.token_to_id("[UNK]")
    lengths = []
    for sample in samples(folder, "train"):
        tokens = tokenizer.encode(sample["txt"].decode(), 64)
        assert unknown not in tokens and tokens[-1] == tokenizer.pad
        lengths.append((tokens != tokenizer.pad).sum())
    assert np.mean(lengths) < 10
    assert tokenizer.decode(tokenizer.encode("waving hand: medium skin tone", 64)) == "waving hand : medium skin tone"


@pytest.mark.slow
def test_it_is_what_training_gets_by_default(cache):
    config = DataConfig(cache=str(cache), workers=0)
    shape = Shape(image_size=64, text_length=32)
    train, held_out = open_train(config, 0, shape), open_held_out(config, shape)
    assert len(train) + len(held_out) == 3953
    batch, _ = train.batch(range(8))
    assert batch["image"].shape == (8, 3, 64, 64) and batch["tokens"].shape == (8, 32)
    first = samples(openmoji.ensure_openmoji(cache), "held_out")[0]
    assert held_out.tokenizer.decode(held_out.batch([0])[0]["tokens"][0]) == first["txt"].decode().lower()
    german = open_held_out(DataConfig(cache=str(cache), language="de"), shape)
    assert (german.batch([0])[0]["tokens"] != held_out.batch([0])[0]["tokens"]).any()


@pytest.mark.slow
def test_a_killed_build_is_built_again_to_the_same_bytes(folder, tmp_path):
    builder = start_build(tmp_path)
    while not list(tmp_path.glob("*.building/train-*.tar")):
        assert builder.poll() is None
        time.sleep(0.05)
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert not (tmp_path / openmoji.folder_name()).exists()
    rebuilt = openmoji.ensure_openmoji(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name, "openmoji.lock"]
    for path in folder.iterdir():
        assert (rebuilt / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = start_build(tmp_path / "file" / "cache")
    _, stderr = done.communicate()
    assert done.returncode == 2
    assert stderr.startswith("error: cache folder") and "MUG_CACHE" in stderr and len(stderr.splitlines()) == 1
