"""run/train_tokenizer.py as users start it."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import run_script

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import Sample, write_shards, write_tar
from mug.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
COUNT = 50


def train(*arguments: object) -> subprocess.CompletedProcess:
    return run_script("run/train_tokenizer.py", *arguments)


def caption(i: int, language: str = "en") -> str:
    return f"{'number' if language == 'en' else 'nummer'} {i:03d}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """COUNT pairs in shards of 20; those from 30 on have a German caption, too."""
    folder = tmp_path_factory.mktemp("shards")
    metas = [{"captions": {"de": [caption(i, "de")]}} if i >= 30 else {} for i in range(COUNT)]
    samples = (Sample(f"{i:03d}", b"image", "png", caption(i), meta) for i, meta in enumerate(metas))
    list(write_shards(samples, folder, "", "tar", 20))
    return folder


def oracle(captions) -> dict:
    return json.loads(train_tokenizer(captions, 600).to_str())


def test_all_captions(shards, tmp_path):
    out = tmp_path / "tokenizer.json"
    done = train(f"{shards}/{{00000..00001}}.tar", f"{shards}/00002.tar", "--out", out, "--vocabulary", "600")
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == oracle(caption(i) for i in range(COUNT))
    assert "50 of 50 pairs" in done.stdout and done.stdout.splitlines()[-1].startswith(f"{out}: ")
    assert Tokenizer.load(out).decode(Tokenizer.load(out).encode(caption(7), 12)) == caption(7)
    assert list(tmp_path.iterdir()) == [out]


def test_a_spread_sample_in_two_languages(shards, tmp_path):
    out = tmp_path / "tokenizer.json"
    options = ("--vocabulary", "600", "--samples", "5", "--language", "en,de")
    done = train(f"{shards}/*.tar", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    read = [caption(i) for i in (0, 10, 20, 30, 40)] + [caption(i, "de") for i in (30, 40)]
    assert json.loads(out.read_text()) == oracle(read)


MISTAKES = {
    "missing shards": (["{tmp}/nowhere.tar"], "nowhere.tar"),
    "small vocabulary": (["{shards}/00000.tar", "--vocabulary", "10"], "vocabulary of 10 is too small"),
    "no captions": (["{tmp}/empty.tar"], "no word"),
    "no samples": (["{shards}/00000.tar", "--samples", "0"], "--samples"),
    "no language": (["{shards}/00000.tar", "--language", ","], "language"),
    "a language that no pair has": (
        ["{shards}/*.tar", "--language", "fr,it"],
        "give languages that they have: en (50), de (20)",
    ),
    "no shards": ([], "shards"),
    "no folder": (["{shards}/00000.tar", "--out", "{tmp}/no/t.json"], "no is missing"),
    "there already": (["{shards}/00000.tar", "--out", "{tmp}/empty.tar"], "empty.tar exists"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(shards, tmp_path, case):
    list(write_shards([Sample("k", b"image", "png", "", {})], tmp_path, "", "tar", 1))
    (tmp_path / "00000.tar").rename(tmp_path / "empty.tar")
    arguments, names = MISTAKES[case]
    arguments = [argument.format(tmp=tmp_path, shards=shards) for argument in arguments]
    done = train("--out", tmp_path / "tokenizer.json", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and names in done.stderr
    assert not (tmp_path / "tokenizer.json").exists()


def test_images_of_any_size_and_texts_of_any_kind(shards, tmp_path):
    """One image beyond every limit, texts with a byte order mark, in UTF-16 and in Latin-1, and a pair without any."""
    folder = tmp_path / "a folder, with signs"
    folder.mkdir()
    texts = [b"\xef\xbb\xbfone barn", "two barns".encode("utf-16"), b"three caf\xe9s", b""]
    members = [(f"{i}.{end}", body) for i, text in enumerate(texts) for end, body in (("jpg", b"i"), ("txt", text))]
    write_tar(folder / "a.tar", [*members, ("4.bmp", bytes(64 * 2**20 + 1)), ("4.caption.txt", b"a large scan")])
    done = train(f"{folder}/*.tar", "--out", tmp_path / "t.json", "--vocabulary", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ["one barn", "two barns", "three caf\ufffds", "a large scan"]
    assert json.loads((tmp_path / "t.json").read_text()) == oracle(expected)
    assert "warning: 1 of 4 captions read are not UTF-8" in done.stdout


def test_no_captions_says_what_there_is(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"i"), ("1.blurb", b"a dog"), ("2.jpg", b"i")])
    done = train(tmp_path / "a.tar", "--out", tmp_path / "t.json")
    assert done.returncode == 2 and "no word to learn from" in done.stderr
    assert "none of 2 samples read have a caption; the shards have files .jpg, .blurb" in done.stdout
    done = train(tmp_path / "a.tar", "--out", tmp_path / "t.json", "--caption", "blurb")
    assert done.returncode == 0, done.stderr
