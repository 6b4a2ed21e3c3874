"""Builders from manuals and flags: what they take from small packages of the real form, and what they leave out."""

import io
import json
from pathlib import Path

import pytest
from commands import run_script
from PIL import Image
from test_language_builders import pack

from mug.data.builders.flags import flag_pairs, read_flags
from mug.data.builders.gimp_help import gimp_help_pairs, read_gimp_help, read_gimp_help_texts
from mug.data.builders.libreoffice_help import read_libreoffice_help
from mug.data.builders.manuals import of_pages
from mug.data.errors import DataError
from mug.data.left_out import LeftOut


def everything(key: str) -> bool:
    return True


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# --- LibreOffice --------------------------------------------------------------------------------------------


def help_page(folder: Path, code: str, page: str, **paragraphs: str) -> None:
    inside = "".join(f'<p id="{name}" class="paragraph">{text}</p>\n' for name, text in paragraphs.items())
    page_file = folder / f"libreoffice-help-{code.lower()}/usr/share/libreoffice/help/{code}/text/{page}.html"
    write(page_file, f'<html lang="{code}"><body><p dir="auto">Note</p>{inside}</body></html>')


@pytest.fixture
def libreoffice(tmp_path) -> Path:
    english = {"par_id1": 'Press <span class="emph">Ctrl\n+ S</span>.', "par_id2": "Calc", "par_id3": "All cells."}
    help_page(tmp_path, "en-US", "scalc/01", **english)
    help_page(tmp_path, "de", "scalc/01", par_id1="Drücken Sie <b>Strg + S</b>.", par_id2="Calc", par_id9="Neu.")
    help_page(tmp_path, "pt-BR", "scalc/01", par_id3="Todas as células.")
    help_page(tmp_path, "en-US", "swriter/02", hd_id7="All cells.", hd_id8="Fish &amp; chips")
    help_page(tmp_path, "de", "swriter/02", hd_id7="Alle Zellen.", hd_id8="Fisch &amp; Chips")
    return tmp_path


def test_paragraphs_of_libreoffice_are_aligned_by_their_numbers(libreoffice):
    left_out = LeftOut()
    rows = {one.key: one for one in read_libreoffice_help(libreoffice, left_out)}
    assert {key: one.meta["captions"] for key, one in rows.items()} == {
        "scalc/01/par_id1": {"en": "Press Ctrl + S.", "de": "Drücken Sie Strg + S."},
        "scalc/01/par_id3": {"en": "All cells.", "pt": "Todas as células."},
        "swriter/02/hd_id8": {"en": "Fish & chips", "de": "Fisch & Chips"},
    }
    assert all("MPL-2.0" in one.meta["license"] and one.extension is None for one in rows.values())
    assert left_out.kinds == {
        "texts that are not translated": (1, "'Calc' in 'de'"),
        "texts without the English": (1, "'Neu.' in 'de'"),
        "texts that stand on an earlier page, too": (1, "'All cells.'"),
    }


def test_a_split_is_by_page(libreoffice):
    rows = read_libreoffice_help(libreoffice, LeftOut())
    assert [one.key for one in of_pages(rows, lambda page: page == "scalc/01")] == [
        "scalc/01/par_id1",
        "scalc/01/par_id3",
    ]


@pytest.mark.parametrize("read", [read_libreoffice_help, read_gimp_help, read_gimp_help_texts])
def test_packages_that_are_missing(tmp_path, read):
    with pytest.raises(
        DataError, match=r"in English and another language: apt-get download (libre|gimp).* dpkg-deb -x"
    ):
        read(tmp_path, LeftOut())


# --- GIMP ---------------------------------------------------------------------------------------------------

FIGURE = """<div class="figure"><p class="title"><strong>Figure 1.</strong></p><div class="mediaobject">
<img src="images/{src}" alt="{alt}" />{caption}</div></div>"""


def figure(src: str, alt: str, caption: str = "") -> str:
    return FIGURE.format(src=src, alt=alt, caption=caption and f'<div class="caption"><p>{caption}</p></div>')


def manual_page(folder: Path, language: str, name: str, *parts: str) -> None:
    inside = f"gimp-help-{language}/usr/share/gimp/2.0/help/{language}"
    write(folder / inside / f"{name}.html", f"<html><body>{''.join(parts)}</body></html>")


@pytest.fixture
def gimp(tmp_path) -> Path:
    taj = ("filters/taj.png", "Lens Flare", "Original  image")
    dialog, icon = figure("filters/flare.png", "Options"), figure("next.png", "Next")
    manual_page(
        tmp_path, "en", "flare", icon, figure(*taj), dialog, figure(*taj[:2]), "<p>A <b>flare</b>.</p><p>OK</p>"
    )
    german = [figure(taj[0], "Linsenreflex", "Originalbild"), figure("filters/flare.png", "Options")]
    german += [figure(taj[0], "Linsenreflex"), "<p>Ein Reflex.</p><p>OK</p>"]
    manual_page(tmp_path, "de", "flare", *german)
    manual_page(tmp_path, "en", "glow", figure(taj[0], "The Taj"), figure("filters/lost.png", "Lost"), "<p>Glow.</p>")
    manual_page(
        tmp_path, "de", "glow", figure(taj[0], "Das Taj"), figure("filters/lost.png", "Weg"), "<p>A</p><p>B</p>"
    )
    pictures = tmp_path / "gimp-help-en/usr/share/gimp/2.0/help/en/images/filters"
    pictures.mkdir(parents=True)
    for name in ("taj", "flare"):
        Image.new("RGB", (40, 30), "red").save(pictures / f"{name}.png")
    return tmp_path


def test_figures_of_gimps_manual_with_their_captions(gimp):
    left_out = LeftOut()
    pairs = {one.key: one for one in gimp_help_pairs(read_gimp_help(gimp, left_out), everything)}
    assert {key: one.meta["captions"] for key, one in pairs.items()} == {
        "flare/filters/taj-0": {"en": "Original image", "de": "Originalbild"},
        "flare/filters/taj-1": {"en": "Lens Flare", "de": "Linsenreflex"},
        "glow/filters/taj-0": {"en": "The Taj", "de": "Das Taj"},
    }
    assert {one.meta["page"] for one in pairs.values()} == {"flare"}, "one picture, one side of a split"
    one = pairs["flare/filters/taj-0"]
    assert Image.open(io.BytesIO(one.image)).size == (40, 30) and one.meta["license"].startswith("GFDL")
    assert left_out.kinds == {
        "icons of the manual's own": (1, "'images/next.png'"),
        "texts that are not translated": (1, "'Options' in 'de'"),
        "figures without a picture": (1, "'images/filters/lost.png' on 'glow'"),
    }


def test_paragraphs_of_gimps_manual(gimp):
    left_out = LeftOut()
    rows = read_gimp_help_texts(gimp, left_out)
    assert [(one.key, one.meta["captions"]) for one in rows] == [("flare/0", {"en": "A flare.", "de": "Ein Reflex."})]
    assert left_out.kinds == {
        "pages with other paragraphs than the English": (1, "'glow' in 'de'"),
        "texts that are not translated": (1, "'OK' in 'de'"),
    }


def test_shards_of_the_manual_are_built(gimp, tmp_path):
    done = run_script("run/build_shards.py", "gimp-help", gimp, "--out", tmp_path / "out", "--held_out", "0")
    assert done.returncode == 0, done.stderr
    assert "3 pairs, 3 with a caption; left out: 1 icons of the manual's own" in done.stdout


# --- Flags --------------------------------------------------------------------------------------------------


def test_flags_with_the_names_of_their_territories(tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 480"><path fill="#f00" d="M0 0h640v480H0z"/></svg>'
    pack(
        tmp_path, "flag-icons-7.5.0", {f"flags/{size}/{key}.svg": svg for size in ("4x3", "1x1") for key in ("de", "x")}
    )
    names = {"en": {"DE": "Germany", "X": "X"}, "fr": {"DE": "Allemagne"}, "aa": {"DE": "DE"}}
    files = {
        f"main/{locale}/territories.json": json.dumps({"main": {locale: {"localeDisplayNames": {"territories": some}}}})
        for locale, some in names.items()
    }
    pack(tmp_path, "cldr-localenames-full-48.2.0", files)
    left_out = LeftOut()
    (flag,) = flag_pairs(read_flags(tmp_path, left_out), everything)
    assert (flag.key, flag.caption, flag.meta["captions"]) == ("de", "Germany", {"en": "Germany", "fr": "Allemagne"})
    image = Image.open(io.BytesIO(flag.image)).convert("RGB")
    assert image.size == (128, 96) and image.getpixel((64, 48)) == (255, 0, 0)
    assert left_out.kinds == {"flags without a name in CLDR": (1, "'x'")}
    pack(tmp_path, "cldr-localenames-full-48.2.0", {"main/en/territories.json": '{"main": []}'})
    with pytest.raises(DataError, match=r"main/en/territories\.json of npm package cldr-localenames-full is damaged"):
        read_flags(tmp_path, left_out)
