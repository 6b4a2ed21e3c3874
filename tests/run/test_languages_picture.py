"""The picture of captions in several languages, and what run/generate.py makes it of."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from encoded import one_colour
from PIL import Image

from mug.data.builders.unigram_training import train_unigram
from mug.data.builders.writers import write_tar
from mug.data.config import DataConfig
from mug.data.tokenizer import Tokenizer
from mug.run import generate
from mug.run.common.errors import RunError
from mug.run.reporting.languages import WIDTH, Captioned, draw_languages

LANGUAGES = ("de", "en", "ja")
NAMES = {"de": "roter Apfel", "en": "red apple", "ja": "赤リンゴ"}
SVG = "{http://www.w3.org/2000/svg}"


def texts_of(svg: str) -> dict[str, str]:
    """Text → its colour, of those that have one of their own."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return {one.text: one.get("fill") for one in found if one.get("fill")}


def test_captions_are_marked_and_escaped():
    written = {"de": "Roter Apfel", "en": "<b> & pear", "ja": "", "zh": "果" * 40}
    true = {"de": ["roter Apfel"], "en": ["red apple", "apple"], "ja": ["赤リンゴ"]}
    svg = draw_languages([Captioned(Image.new("RGB", (9, 9), "red"), written, true)] * 2, "run, step 3 & more")
    texts, page = texts_of(svg), ElementTree.fromstring(svg)
    assert texts["Roter Apfel"] == "#0a7d33" and "roter Apfel" not in texts, "true but for case"
    assert texts["<b> & pear"] == "#1f2328" and texts["red apple"] == "#5f6771" and "apple" not in texts
    assert texts["(nothing)"] == "#1f2328" and "赤リンゴ" in texts
    (cut,) = (text for text in texts if text.startswith("果"))
    assert cut.endswith("…") and len(cut) < 20
    images = list(page.iter(f"{SVG}image"))
    assert len(images) == 2 and all(one.get("href").startswith("data:image/png;base64,") for one in images)
    assert not re.search(r'href="(?!data:)', svg), "the picture must need no other file"
    assert page.get("width") == str(WIDTH)


class Writes(torch.nn.Module):
    """Writes the true caption in German and English, an English one in Japanese."""

    config = SimpleNamespace(image_size=16)

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def languages(self) -> tuple[str, ...]:
        return LANGUAGES

    def check_captions(self) -> None:
        pass

    def caption(self, image_BCHW: torch.Tensor, beams: int = 1, language: int = 0) -> torch.Tensor:
        text = NAMES["en" if LANGUAGES[language] == "ja" else LANGUAGES[language]]
        return torch.from_numpy(self.tokenizer.encode(text, 12)).expand(len(image_BCHW), -1)


def options(folder: Path, languages: str) -> SimpleNamespace:
    own = {"inputs": [str(folder / "a.tar"), str(folder / "photo.png")], "cache": str(folder / "cache")}
    return SimpleNamespace(**own, limit=4, beams=1, languages=languages)


def test_images_with_captions_in_languages(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.json").write_text(train_unigram(NAMES.values(), 1100, LANGUAGES).to_str(), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    photo = one_colour("red", (20, 20))
    (tmp_path / "photo.png").write_bytes(photo)
    write_tar(tmp_path / "a.tar", [("a.json", json.dumps({"captions": NAMES}).encode()), ("a.png", photo)])
    monkeypatch.setattr(generate, "pairs_of", lambda found: DataConfig())
    found = SimpleNamespace(folder=tmp_path / "run" / "checkpoint-3", step=3)
    model = Writes(tokenizer)
    svg = generate.in_languages(options(tmp_path, "en, ja"), model, tokenizer, found)
    texts = texts_of(svg)
    assert svg.count("<image ") == 2 and "run, step 3: captions in en, ja" in svg
    assert texts["red apple"] == "#1f2328" and texts["赤リンゴ"] == "#5f6771", "that of Japanese is English"
    assert svg.count('fill="#0a7d33"') == 1, "of the pair; the photo has no true caption"
    with pytest.raises(RunError, match="does not write in fr; it writes in de, en, ja"):
        generate.in_languages(options(tmp_path, "en,fr"), model, tokenizer, found)
