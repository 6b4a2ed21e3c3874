"""The packages' layout in small, and the packages themselves where they are installed."""

import time
from pathlib import Path

import pytest
from PIL import Image

from mug.data.builders.openclipart import (
    INSTALLED,
    MAX_HEAD,
    MAX_SHARED,
    Metadata,
    captions_of,
    find_openclipart,
    openclipart_pairs,
    read_metadata,
)
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

NAMESPACES = (
    'xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
)


def svg(title="", description="", keywords=(), creator="", head="", tail="") -> str:
    items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    return f"""<?xml version="1.0" encoding="UTF-8"?>{head}
<svg xmlns="http://www.w3.org/2000/svg" {NAMESPACES}><metadata><rdf:RDF><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator>
<dc:rights><cc:Agent><dc:title>not this title</dc:title></cc:Agent></dc:rights>
</cc:Work></rdf:RDF></metadata><path d="M 0 0"/>{tail}</svg>"""


def draw(root: Path, name: str, colour: str, text: str | None) -> None:
    png, drawing = root / "png" / f"{name}.png", root / "svg" / f"{name}.svg"
    for path in (png, drawing):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (30, 20), colour).save(png)
    if text is not None:
        drawing.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """As `dpkg -x` leaves it."""
    root = tmp_path / "usr/share/openclipart"
    frog = svg("Two  frogs", "Sitting in a pond &amp; waiting", ("frog", "green_pond", "hash", "frog"), "A. Painter")
    draw(root, "animals/amphibian/frogs_a.b_01", "green", frog)
    draw(root, "shapes/star_5", "yellow", svg(keywords=("star",)))
    draw(root, "unsorted/no_metadata", "red", "<svg xmlns='http://www.w3.org/2000/svg'/>")
    draw(root, "unsorted/no-svg", "blue", None)
    (root / "png/special").mkdir()
    (root / "png/special/star_5.png").symlink_to("../shapes/star_5.png")
    return tmp_path


def test_known_pairs(folder):
    pairs = {pair.key: pair for pair in openclipart_pairs(find_openclipart(folder), LeftOut(), lambda group: True)}
    assert list(pairs) == sorted(pairs) and len(pairs) == 5
    frogs = pairs["animals/amphibian/frogs_a_b_01"]
    assert frogs.image == (folder / "usr/share/openclipart/png/animals/amphibian/frogs_a.b_01.png").read_bytes()
    assert frogs.caption == frogs.meta["caption"] == "Two frogs"
    assert frogs.meta["captions"] == {"en": ["Two frogs", "Sitting in a pond & waiting", "frog, green pond"]}
    assert (frogs.meta["category"], frogs.meta["label"]) == ("animals/amphibian", "animals")
    assert frogs.meta["creator"] == "A. Painter"
    assert pairs["shapes/star_5"].meta["captions"] == {"en": ["star 5", "star"]}
    assert [pairs[f"unsorted/{name}"].caption for name in ("no_metadata", "no-svg")] == ["no metadata", "no svg"]


def test_the_same_picture_is_on_one_side_of_the_split(folder):
    asked = []
    openclip = openclipart_pairs(
        find_openclipart(folder), LeftOut(), lambda group: asked.append(group) or group == asked[0]
    )
    assert [pair.key for pair in openclip] == ["animals/amphibian/frogs_a_b_01"]
    assert len(asked) == 5 and asked[1] == asked[2] and len(set(asked)) == 4  # shapes/star_5, special/star_5


def test_what_says_nothing_of_the_drawing_is_no_caption():
    metadata = Metadata("Road signs", "mail@example.org", ("road",))
    assert captions_of("no_entry-02", metadata, set()) == ["Road signs", "road"]
    assert captions_of("no_entry-02", metadata, {"Road signs"}) == ["no entry 02", "road"]
    assert captions_of("x", Metadata("Frog", "HASH(0x862bbb8)", ("Frog",)), set()) == ["Frog"]


def test_a_title_that_many_share_is_a_collections(tmp_path):
    for i in range(MAX_SHARED + 1):
        draw(tmp_path, f"a/sign_{i}", f"#0000{i:02x}", svg("Road signs"))
    captions = [pair.caption for pair in openclipart_pairs(tmp_path, LeftOut(), lambda group: True)]
    assert sorted(captions) == sorted(f"sign {i}" for i in range(MAX_SHARED + 1))
    (tmp_path / "png/a/sign_0.png").unlink()
    assert {pair.caption for pair in openclipart_pairs(tmp_path, LeftOut(), lambda group: True)} == {"Road signs"}


def test_encodings():
    assert read_metadata(svg("Türkei").encode()).title == "Türkei"
    latin = svg("Türkei").replace("UTF-8", "iso-8859-1").encode("latin-1")
    assert read_metadata(latin).title == "Türkei"


def test_only_the_head_is_read():
    assert read_metadata(svg("frog", tail="<g>" * MAX_HEAD).encode()).title == "frog"  # not well formed further down
    late = svg("frog", head=f"<!-- {'x' * MAX_HEAD} -->")
    assert read_metadata(late.encode()) == Metadata()


BOMB = "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 12))


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x89PNG",
        svg("frog").encode()[:400],
        svg("frog").replace("UTF-8", "klingon").encode(),
        svg("&a11;", head=f"<!DOCTYPE svg [<!ENTITY a0 'ha'>{BOMB}]>").encode(),
        svg("frog &undefined;").encode(),
    ],
    ids=["empty", "no svg", "cut", "unknown encoding", "billion laughs", "undefined entity"],
)
def test_damaged_metadata_is_none(damaged):
    start = time.perf_counter()
    assert read_metadata(damaged) == Metadata()
    assert time.perf_counter() - start < 2


def test_no_other_file_is_read(tmp_path):
    (tmp_path / "secret").write_text("secret")
    text = svg("frog &x;", head=f"<!DOCTYPE svg [<!ENTITY x SYSTEM 'file://{tmp_path}/secret'>]>")
    assert "secret" not in str(read_metadata(text.encode()))


def test_entities_for_namespaces_are_read():
    """As Adobe Illustrator writes them; 15 files of the packages do."""
    text = svg("frog", head="<!DOCTYPE svg [<!ENTITY cc 'http://web.resource.org/cc/'>]>")
    assert (
        read_metadata(text.replace('xmlns:cc="http://web.resource.org/cc/"', 'xmlns:cc="&cc;"').encode()).title
        == "frog"
    )


def test_missing_packages_are_named(tmp_path):
    with pytest.raises(DataError, match="apt install openclipart-png openclipart-svg"):
        find_openclipart(tmp_path)


@pytest.mark.skipif(not (INSTALLED / "png").is_dir(), reason="needs openclipart-png and openclipart-svg")
def test_the_packages_themselves():
    pairs = list(openclipart_pairs(find_openclipart(INSTALLED), LeftOut(), lambda group: True))
    assert len(pairs) == 8121
    assert len({pair.key for pair in pairs}) == 8121 and len({pair.meta["group"] for pair in pairs}) == 6900
    assert all(pair.caption for pair in pairs)
    assert sum(len(pair.meta["captions"]["en"]) > 1 for pair in pairs) > 7500


def test_a_link_to_nothing_is_left_out(tmp_path):
    for kind in ("png", "svg"):
        (tmp_path / kind).mkdir()
    (tmp_path / "png/a.png").write_bytes(b"image")
    (tmp_path / "png/b.png").symlink_to("nowhere.png")
    left_out = LeftOut()
    assert [pair.key for pair in openclipart_pairs(tmp_path, left_out, lambda group: True)] == ["a"]
    reason = f"'{tmp_path}/png/b.png': No such file or directory"
    assert left_out.kinds == {"files that cannot be read": (1, reason)}
