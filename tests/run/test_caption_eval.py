"""Figures of captions against counting by hand; the command on a checkpoint, against what the model writes."""

import importlib.util
import json
import math
import os
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from evaluation import make_checkpoint, quiet_console
from PIL import Image

from mug.data.builders.writers import Sample, write_tar_shard
from mug.model.generate import write
from mug.run import caption_eval
from mug.run.common.errors import user_errors
from mug.run.evaluate import evaluate, parse
from mug.run.evaluators import captions
from mug.run.evaluators.pictures import draw_rows
from mug.run.generate import what_is_shown
from mug.run.reporting.grid import read_grid
from mug.run.state.restore import restore

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
    metrics = captions.score(WRITTEN, TRUE, lambda line: None)
    assert metrics["BLEU-4"] == pytest.approx(bleu_by_hand(WRITTEN, TRUE, 4))
    assert metrics["BLEU-4 of another image's"] < 10 and metrics["distinct"] == 1
    same = captions.score(["a cat"] * 4, [["a cat"]] * 4, lambda line: None)
    assert same["distinct"] == 0.25
    assert same["BLEU-2"] == same["BLEU-1"] == pytest.approx(100)


def test_what_is_missing_is_reported_once_and_left_out(monkeypatch):
    warnings = []
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    metrics = captions.score(WRITTEN, TRUE, warnings.append)
    assert "CIDEr" not in metrics and "METEOR" not in metrics
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
    make_checkpoint(folder / "run")
    return folder / "run", folder / "pairs.tar"


def start(*arguments: object) -> list[str]:
    """What the command shows."""
    lines: list[str] = []
    with patch.dict(os.environ):  # which gets this process's place among the ranks
        evaluate(quiet_console(lines), caption_eval.parse([*map(str, arguments), "--workers", "0"]))
    return lines


def test_the_run_keeps_what_the_model_wrote(run, tmp_path):
    folder, shards = run
    lines = start(folder, "--shards", shards, "--beams", "3", "--batch", "4", "--cache", tmp_path)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["key"] for row in rows] == [f"key{i}" for i in range(8) if i != 5]
    assert rows[2]["true"] == ["square 2", "red 2", "green 2"] and rows[0]["true"] == ["square 0"]
    model, tokenizer, _ = restore(folder, print)
    colours = np.array([[30 * i, 255 - 30 * i, 90] for i in range(8) if i != 5], dtype=np.uint8)
    image = torch.from_numpy(colours)[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    with torch.inference_mode():
        tokens = write(model.text_decoder, model.vocabulary, model.encoder(image), 3)
    assert [row["written"] for row in rows] == [tokenizer.decode(row[1:]) for row in tokens.tolist()]
    result = json.loads((folder / "results.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    expected = captions.bleu([row["written"] for row in rows], [row["true"] for row in rows], 1)
    assert result["BLEU-1"] == pytest.approx(expected) and result["images"] == 7
    assert result["method"] == "captions, 3 beams" and result["encoder"] == "run, step 3"
    assert any("BLEU-1" in line for line in lines) and "captions: 7 captions, in the run's folder" in lines


def test_results_go_into_another_file_where_one_is_named(run, tmp_path):
    folder, shards = run
    before = (folder / "results.jsonl").read_text(encoding="utf-8") if (folder / "results.jsonl").exists() else None
    start(folder, "--shards", shards, "--beams", "1", "--cache", tmp_path, "--json", tmp_path / "found.jsonl")
    assert json.loads((tmp_path / "found.jsonl").read_text(encoding="utf-8"))["method"] == "captions, 1 beam"
    after = (folder / "results.jsonl").read_text(encoding="utf-8") if (folder / "results.jsonl").exists() else None
    assert before == after


@pytest.mark.parametrize(("pixels", "caption"), [(1.0, 0.0), (0.0, 0.1), (1.0, 0.1)])
def test_a_picture_shows_what_was_trained(tmp_path, pixels, caption):
    make_checkpoint(tmp_path / "run", "--loss_weights.pixels", str(pixels), "--loss_weights.caption", str(caption))
    model, tokenizer, _ = restore(tmp_path / "run", print)
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for picture in draw_rows(model, tokenizer, image, torch.arange(2), ["a", "b"], beams=2):
        assert list(picture.captions) == (["written", "written, 2 beams", "true"] if caption else ["true"])
        assert torch.equal(picture.images["reconstruction"], picture.images["masked"]) == (not pixels)
    note = what_is_shown(model)
    assert ("Objective mug does not write captions." in note) == (not caption)


def test_pictures_of_a_run_are_of_its_held_out_pairs(run, tmp_path):
    _, shards = run
    make_checkpoint(
        tmp_path / "own", "--data.shards", "x.tar", "--data.held_out", str(shards), "--data.tokenizer", "x.json"
    )
    lines: list[str] = []
    arguments = [str(tmp_path / "own"), "--eval", "pictures", "--pictures.count", "3", "--cache", str(tmp_path)]
    with patch.dict(os.environ):
        evaluate(quiet_console(lines), parse([*arguments, "--workers", "0"]))
    assert "pictures: 3 pictures, in the run's folder" in lines
    rows = read_grid(tmp_path / "own" / "samples" / "step-3.png")
    assert [row.captions["true"] for row in rows] == ["square 0", "square 2", ""]
    assert np.asarray(rows[1].images["original"])[0, 0].tolist() == [60, 195, 90]


def test_a_mistake_is_one_line(run, tmp_path):
    folder, shards = run
    make_checkpoint(tmp_path / "own", "--data.shards", "train.tar", "--data.tokenizer", "x.json")
    make_checkpoint(tmp_path / "masked", "--model.captioning", "masked-language")
    make_checkpoint(tmp_path / "pixels", "--loss_weights.caption", "0")
    for arguments, names in (
        ((folder, "--beams", "0"), "--beams must be at least 1"),
        ((tmp_path / "own",), "without data.held_out; give pairs by the option `shards`"),
        ((tmp_path / "masked", "--shards", shards), "cannot write captions"),
        ((tmp_path / "pixels", "--shards", shards), "never learned to write captions: its loss_weights.caption is 0"),
        ((folder, "--shards", tmp_path / "none.tar", "--cache", tmp_path), "none.tar"),
    ):
        with pytest.raises(user_errors()) as refused:
            start(*arguments)
        assert names in str(refused.value) and "\n" not in str(refused.value)
        assert not torch.distributed.is_initialized()
