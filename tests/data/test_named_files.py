"""Tars whose files have names between key and extension, against the pairs that people mean by them."""

import pytest
from encoded import tar_bytes

from mug.data.errors import DataError
from mug.data.index import rows
from mug.data.index.tar_samples import UNUSED, scan_tar


def scan(names: list[str], caption: str | None = None) -> tuple[rows.Scan, bytes]:
    """Of a tar whose files hold their names."""
    data = tar_bytes((name, name.encode()) for name in names)
    return scan_tar(lambda offset, length: data[offset : offset + length], len(data), caption=caption), data


def pairs(names: list[str], caption: str | None = None) -> dict[str, tuple[str | None, ...]]:
    """Key → image, text and json, by their names; one space between two of `names`."""
    found, data = scan(names, caption)

    def name(row: dict, part: str) -> str | None:
        offset, length = row[f"{part}_offset"], row[f"{part}_length"]
        return data[offset : offset + length].decode() if length >= 0 else None

    return {row["key"]: tuple(name(row, part) for part in rows.PARTS) for row in found.rows.to_pylist()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("k.jpg k.caption.txt", {"k": ("k.jpg", "k.caption.txt", None)}),
        ("k.jpg k.Prompt.TXT", {"k": ("k.jpg", "k.Prompt.TXT", None)}),
        ("k.jpg k.caption", {"k": ("k.jpg", "k.caption", None)}),
        ("k.jpg k.txt k.caption.txt", {"k": ("k.jpg", "k.txt", None)}),
        ("k.jpg k.alt.txt k.caption_0.txt k.json", {"k": ("k.jpg", "k.caption_0.txt", "k.json")}),
        ("d.1/k.jpg d.1/k.text.txt", {"d.1/k": ("d.1/k.jpg", "d.1/k.text.txt", None)}),
        ("k.jpg k.license.txt k.cls", {"k": ("k.jpg", None, None)}),  # text, but of what?
        ("k.input.jpg k.output.txt", {"k": ("k.input.jpg", "k.output.txt", None)}),
        ("k.input.jpg k.txt k.json", {"k": ("k.input.jpg", "k.txt", "k.json")}),
        ("k.input.jpg k.caption.txt k.note.txt", {"k": ("k.input.jpg", "k.caption.txt", None)}),
        ("k.jpg k.mask.png", {"k": ("k.jpg", None, None)}),
        ("photo.final.jpg photo.final.txt", {"photo.final": ("photo.final.jpg", "photo.final.txt", None)}),
        ("barn_1.5m.jpg", {"barn_1.5m": ("barn_1.5m.jpg", None, None)}),
        (
            "v2.0.jpg v2.0.txt v2.1.JPG v2.1.txt v2.1.json",
            {"v2.0": ("v2.0.jpg", "v2.0.txt", None), "v2.1": ("v2.1.JPG", "v2.1.txt", "v2.1.json")},
        ),
        ("._k.jpg .k.caption.txt", {}),
    ],
)
def test_names_that_have_one_meaning(names, expected):
    assert pairs(names.split()) == expected
    assert pairs(names.split()[::-1]) == expected  # in any order


def test_plain_samples_keep_their_places_and_images_their_sizes():
    found, _ = scan(["a.jpg", "b.x.jpg", "b.x.txt", "c.jpg", "c.caption.txt", "d.txt"])
    assert found.rows["key"].to_pylist() == ["a", "c", "b.x"]
    assert (found.no_caption, found.left_out.kinds) == (1, {"keys without an image": (1, "'d'")})


@pytest.mark.parametrize("option", ["blurb.txt", ".blurb.txt", "Blurb.TXT"])
def test_an_option_names_the_extension(option):
    names = ["k.jpg", "k.txt", "k.caption.txt", "k.blurb.txt", "l.jpg", "l.txt"]
    assert pairs(names, option) == {"k": ("k.jpg", "k.blurb.txt", None), "l": ("l.jpg", None, None)}
    assert pairs(["k.jpg", "k.txt", "k.cap"], "cap") == {"k": ("k.jpg", "k.cap", None)}
    assert pairs(["k.jpg", "k.txt"], "txt") == {"k": ("k.jpg", "k.txt", None)}
    with pytest.raises(DataError, match=r"no files \.blurb\.txt, .* it has files \.jpg, \.txt"):
        scan(["k.jpg", "l.jpg", "k.txt"], option)


def test_what_was_seen_is_reported_where_captions_are_few():
    found, _ = scan(["a.jpg", "b.jpg", "a.license.txt", "b.cls", "b.license.txt"])
    assert (found.no_caption, found.seen) == (2, "files .jpg, .license.txt, .cls")
    assert scan(["a.jpg", "b.jpg", "a.txt", "b.txt"])[0].seen == ""
    assert scan(["a.jpg", "a.alt.txt", "a.prompt.txt"])[0].choice == "'prompt', not 'alt'"


def test_files_that_no_sample_takes_are_counted():
    names = ["k.jpg", "k.mask.png", "k.txt", "k.caption.txt", "k.license.txt", "v.0.jpg", "v.0.txt"]
    assert scan(names)[0].left_out.kinds == {UNUSED: (3, "'k.mask.png'")}
    others = {"'.txt' files": (3, "'k.txt'"), UNUSED: (1, "'k.mask.png'")}
    assert scan(names, "caption.txt")[0].left_out.kinds == others
