"""Captions of two things in ten languages: as a reader of each would write them, and of no two different pictures."""

from itertools import permutations

import pytest

from mug.data.builders import openmoji_composed_languages
from mug.data.builders.composed_captions import RELATIONS, TABLE, compose_caption
from mug.data.builders.openmoji_compositions import COUNTS, THINGS
from mug.data.config import DataConfig, TextConfig
from mug.data.kinds import bitext, pairs
from mug.data.kinds.samples import Shape
from mug.run.evaluators.correct_captions import found

OWLS = {  # left of an elephant, above one, alone
    "en": ("an owl left of an elephant", "an owl above an elephant", "an owl"),
    "de": ("eine Eule links von einem Elefanten", "eine Eule über einem Elefanten", "eine Eule"),
    "fr": ("un hibou à gauche d'un éléphant", "un hibou au-dessus d'un éléphant", "un hibou"),
    "es": ("un búho a la izquierda de un elefante", "un búho encima de un elefante", "un búho"),
    "it": ("un gufo a sinistra di un elefante", "un gufo sopra un elefante", "un gufo"),
    "pt": ("uma coruja à esquerda de um elefante", "uma coruja acima de um elefante", "uma coruja"),
    "id": ("burung hantu di sebelah kiri gajah", "burung hantu di atas gajah", "burung hantu"),
    "zh": ("大象左边的猫头鹰", "大象上方的猫头鹰", "猫头鹰"),
    "ja": ("ゾウの左のフクロウ", "ゾウの上のフクロウ", "フクロウ"),
    "ko": ("코끼리 왼쪽의 부엉이", "코끼리 위의 부엉이", "부엉이"),
}


@pytest.mark.parametrize("language", RELATIONS)
def test_captions(language):
    captions = [compose_caption(language, ["owl", "elephant"], relation) for relation in ("left of", "above")]
    captions.append(compose_caption(language, ["owl"], ""))
    assert tuple(caption.text for caption in captions) == OWLS[language]
    for caption in captions:
        for phrases in caption.parts.values():
            assert all(found(phrases, caption.text)), "evaluation finds what a caption is made of"


@pytest.mark.parametrize("language", RELATIONS)
def test_two_pictures_have_two_captions(language):
    assert TABLE[language].keys() == THINGS.keys()
    whats = [(things, relation) for things in permutations(THINGS, 2) for relation in RELATIONS["en"]]
    texts = {compose_caption(language, *what).text for what in whats}
    assert len(texts) == len(whats) == 32 * 31 * 2


def test_a_language_without_phrases_is_none_of_them():
    with pytest.raises(KeyError):
        compose_caption("xx", ["owl"], "")


def test_kinds_of_several_languages_read_them(tmp_path, monkeypatch):
    monkeypatch.setitem(COUNTS, "train", 40)
    monkeypatch.setitem(COUNTS, "held_out", 12)
    options = {"cache": str(tmp_path), "embedded": "composed_languages", "language": "de,ja", "workers": 0}
    samples = pairs.open_train(DataConfig(**options, rotate=True), 0, Shape(64, 24))
    translations = bitext.open_held_out(TextConfig(**options), Shape(None, 24))
    assert (len(samples), len(translations)) == (40, 12)
    assert samples.tokenizer.languages == tuple(RELATIONS)
    row, _ = translations.batch([3])
    written = [translations.tokenizer.decode(row[side][0].tolist()) for side in ("source", "target")]
    assert "ein" in written[0] and "の" in written[1]
    assert (tmp_path / openmoji_composed_languages.folder_name()).is_dir()
