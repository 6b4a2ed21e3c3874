"""Figures of captions against counting by hand; the command on a checkpoint, against what the model writes."""

import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mug.data.tokenizer_training import train_tokenizer
from mug.data.writers import Sample, write_tar_shard
from mug.model.generate import beam_search
from mug.model.mug import MUG
from mug.model.presets import ModelConfig, Vocabulary, resolve
from mug.run.evaluation import captions
from mug.run.training.checkpoint import commit, open_partial
from mug.run.training.restore import describe_model, restore
from mug.run.training.samples import rows as pictured
from mug.run.training.sharded_state import WEIGHT, Piece, write_pieces

ROOT = Path(__file__).parents[2]

WRITTEN = ["a cat sat on the mat today", "two dogs run over a green lawn", "the red car stops at"]
TRUE = [
    ["the cat sat on the mat", "A cat sat on a mat today"],
    ["two dogs run over the field", "dogs run over a green field quickly", "two brown dogs"],
    ["the red car stops at the light"],
]


def bleu_by_hand(written: list[str], true: list[list[str]], order: int) -> float:
    """Papineni's: clipped n-gram precision of the corpus, brevity penalty by the closest reference."""
    hits, totals, length, closest = [0] * order, [0] * order, 0, 0
    for caption, references in zip(written, true, strict=True):
        words, lists = caption.lower().split(), [reference.lower().split() for reference in references]
        length += len(words)
        closest += min((abs(len(r) - len(words)), len(r)) for r in lists)[1]
        for n in range(1, order + 1):
            grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
            best = Counter()
            for reference in lists:
                best |= Counter(zip(*(reference[i:] for i in range(n)), strict=False))
            hits[n - 1] += sum((grams & best).values())
            totals[n - 1] += grams.total()
    precision = math.exp(sum(math.log(h / t) for h, t in zip(hits, totals, strict=True)) / order)
    return 100 * precision * min(1.0, math.exp(1 - closest / length))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_is_papinenis(order):
    expected = bleu_by_hand(WRITTEN, TRUE, order)
    assert 50 < expected < 99
    assert captions.bleu(WRITTEN, TRUE, order) == pytest.approx(expected)


def test_figures_tell_captions_from_their_images():
    figures = captions.score(WRITTEN, TRUE, lambda line: None)
    assert figures["BLEU-4"] == pytest.approx(bleu_by_hand(WRITTEN, TRUE, 4))
    assert figures["BLEU-4 of another image's"] < 10 and figures["distinct"] == 1
    same = captions.score(["a cat"] * 4, [["a cat"]] * 4, lambda line: None)
    assert same["distinct"] == 0.25
    assert same["BLEU-2"] == same["BLEU-1"] == pytest.approx(100)


def test_what_is_missing_is_said_once_and_left_out(monkeypatch):
    warnings = []
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    figures = captions.score(WRITTEN, TRUE, warnings.append)
    assert "CIDEr" not in figures and "METEOR" not in figures
    assert len(warnings) == 2 and all("pycocoevalcap is not installed" in line for line in warnings)
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    assert captions.missing() == {"METEOR": "it needs Java"}


def test_words_lose_case_and_punctuation():
    assert captions.words("A man's Hat, on-top (red)!") == "a man's hat on-top red"


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap")
@pytest.mark.parametrize("name", captions.OPTIONAL)
def test_cider_and_meteor_order_captions_as_people_would(name):
    if name in captions.missing():
        pytest.skip(captions.missing()[name])
    own = [[references[0]] for references in TRUE]
    perfect = captions.coco(name, [references[0] for references in own], own)
    close, wrong = captions.coco(name, WRITTEN, own), captions.coco(name, [*WRITTEN[1:], WRITTEN[0]], own)
    assert perfect == pytest.approx({"CIDEr": 10.0, "METEOR": 1.0}[name], abs=1e-3)
    assert wrong < close / 3 < perfect / 3


# --- The command -------------------------------------------------------------------------------------------

SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "text_length": 8}
SIZES |= {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "text_width": 16, "text_heads": 2}
DATA = {"shards": None, "held_out": None, "language": "en"}


def make_checkpoint(run: Path, data: dict, pixels: float = 1.0, caption: float = 0.1, **options: object) -> None:
    """A checkpoint of an untrained model with sharp opinions, as a training run with these loss weights writes it."""
    tokenizer = train_tokenizer(["red green blue square of one colour"] * 3, 512)
    ids = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("pad", "bos", "eos", "mask")}
    torch.manual_seed(0)
    config = resolve(ModelConfig(text_unimodal_layers=1, text_cross_layers=1, tied_head=False, **SIZES, **options))
    model = MUG(config, Vocabulary(tokenizer.get_vocab_size(), **ids))
    with torch.no_grad():
        model.text_decoder.head.weight.mul_(40)
    file = f"{WEIGHT}-00000-of-00001.safetensors"
    pieces = {Piece(name, 0): p.detach().flatten() for name, p in model.named_parameters()}
    seal, _ = write_pieces(open_partial(run, 3) / file, pieces)
    state = {
        "model": describe_model("mug", model),
        "recipe": {"data": data, "loss_weights": {"pixels": pixels, "caption": caption}},
    }
    commit(run, 3, {file: seal}, state, {"tokenizer.json": tokenizer.to_str()}, keep=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A run's folder, and shards with seven captioned images and one without a caption."""
    folder = tmp_path_factory.mktemp("captions")
    samples = []
    for i in range(8):
        Image.new("RGB", (20, 16), (30 * i, 255 - 30 * i, 90)).save(folder / "image.png")
        caption = "" if i == 5 else f"square {i}"
        meta = {"captions": {"en": [f"red {i}", f"green {i}"]}} if i == 2 else {}
        samples.append(Sample(f"key{i}", (folder / "image.png").read_bytes(), "png", caption, meta))
    write_tar_shard(folder / "pairs.tar", samples)
    make_checkpoint(folder / "run", DATA)
    return folder / "run", folder / "pairs.tar"


def start(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "run/caption_eval.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_run_keeps_what_the_model_wrote(run, tmp_path):
    folder, shards = run
    done = start(folder, "--shards", shards, "--beams", "3", "--batch", "4", "--cache", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [f"key{i}" for i in range(8) if i != 5]
    assert rows[2]["true"] == ["square 2", "red 2", "green 2"] and rows[0]["true"] == ["square 0"]
    model, tokenizer, _ = restore(folder, print)
    colours = np.array([[30 * i, 255 - 30 * i, 90] for i in range(8) if i != 5], dtype=np.uint8)
    image = torch.from_numpy(colours)[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    with torch.inference_mode():
        tokens = beam_search(model, model.encoder(image), 3)
    assert [row["written"] for row in rows] == [tokenizer.decode(row[1:]) for row in tokens.tolist()]
    result = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    expected = captions.bleu([row["written"] for row in rows], [row["true"] for row in rows], 1)
    assert result["BLEU-1"] == pytest.approx(expected) and result["images"] == 7
    assert result["method"] == "captions, 3 beams" and result["encoder"] == "run, step 3"
    assert "BLEU-1" in done.stdout and "distinct" in done.stdout


@pytest.mark.parametrize(("pixels", "caption"), [(1.0, 0.0), (0.0, 0.1), (1.0, 0.1)])
def test_a_picture_shows_what_was_trained(tmp_path, pixels, caption):
    make_checkpoint(tmp_path / "run", DATA, pixels, caption)
    model, tokenizer, _ = restore(tmp_path / "run", print)
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for sample in pictured(model, tokenizer, image, torch.arange(2), ["a", "b"], beams=2):
        assert list(sample.captions) == (["written", "written, 2 beams", "true"] if caption else ["true"])
        assert torch.equal(sample.reconstruction, sample.masked) == (not pixels)


def test_a_mistake_is_one_line(run, tmp_path):
    folder, shards = run
    make_checkpoint(tmp_path / "own", {**DATA, "shards": "train.tar"})
    make_checkpoint(tmp_path / "masked", DATA, captioning="masked-language")
    make_checkpoint(tmp_path / "pixels", DATA, caption=0.0)
    for arguments, names in (
        ((folder, "--beams", "0"), "--beams must be at least 1"),
        ((tmp_path / "own",), "without data.held_out; name pairs with --shards"),
        ((tmp_path / "masked", "--shards", shards), "cannot write captions"),
        ((tmp_path / "pixels", "--shards", shards), "never learned to write captions: its loss_weights.caption is 0"),
        ((folder, "--shards", tmp_path / "none.tar", "--cache", tmp_path), "none.tar"),
    ):
        done = start(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        errors = done.stderr.strip().splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ") and names in errors[0]
