"""The pairs in a folder as people have them: with links, odd names and other files; what is left out is counted."""

import os
from pathlib import Path

import pytest
from encoded import encode
from pictures import photograph

from mug.data.builders.raw_pairs import folder_pairs, prepared
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

FORMATS = {"jpg": "JPEG", "jfif": "JPEG", "PNG": "PNG", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "webp": "WEBP"}


def image(path: Path, format: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(photograph(8, 6), format))


def pairs(folder: Path, wanted=lambda key: True) -> tuple[dict[str, str], dict[str, int], LeftOut]:
    """key → extension and caption; kind → how many were left out."""
    left_out = LeftOut()
    found = [pair for pair in prepared(folder_pairs(folder, None, left_out, wanted), None, left_out)]
    assert len({pair.key for pair in found}) == len(found)
    return (
        {pair.key: (pair.extension, pair.caption) for pair in found},
        {kind: count for kind, (count, _) in left_out.kinds.items()},
        left_out,
    )


def test_every_format_that_training_reads_in_any_case(tmp_path):
    for suffix, format in FORMATS.items():
        image(tmp_path / f"{suffix}1.{suffix}", format)
        image(tmp_path / f"{suffix}2.{suffix.swapcase()}", format)
        (tmp_path / f"{suffix}1.TXT").write_text(f"of {suffix}")
        (tmp_path / f"{suffix}2.Json").write_text('{"caption": "in json"}')
    found, left_out, _ = pairs(tmp_path)
    assert left_out == {}
    assert len(found) == 14
    assert {caption for key, (_, caption) in found.items() if key.endswith("2")} == {"in json"}
    assert all(found[f"{suffix}1"][1] == f"of {suffix}" for suffix in FORMATS)
    assert {extension for extension, _ in found.values()} == {"jpg", "png", "gif", "bmp", "tif", "webp"}


def test_linked_folders_are_read_and_each_folder_once(tmp_path):
    image(tmp_path / "disk/cats/c.jpg")
    image(tmp_path / "disk/cats/more/d.jpg")
    image(tmp_path / "photos/dogs/e.jpg")
    os.symlink(tmp_path / "disk/cats", tmp_path / "photos/cats")
    os.symlink(tmp_path / "disk/cats", tmp_path / "photos/cats_too")
    os.symlink(tmp_path / "disk/cats", tmp_path / "disk/cats/loop")
    os.symlink(tmp_path / "photos/dogs", tmp_path / "photos/again")
    os.symlink(tmp_path, tmp_path / "photos/up")
    os.symlink(tmp_path / "disk/cats/c.jpg", tmp_path / "photos/one.jpg")
    found, left_out, _ = pairs(tmp_path / "photos")
    assert list(found) == ["one", "cats/c", "cats/more/d", "dogs/e"]
    assert left_out == {"links to folders that are read anyway": 2, "links to folders that another link leads to": 2}
    os.symlink(tmp_path / "photos", tmp_path / "entry")
    assert list(pairs(tmp_path / "entry")[0]) == list(found)


def test_what_is_left_out_is_counted_once_over_both_splits(tmp_path):
    for name in ("a.jpg", "deep/b.jpg", ".hidden.jpg", ".checkpoints/c.jpg"):
        image(tmp_path / name)
    for name in ("d.heic", "e.HEIC", "README", "deep/f.txt", "deep/g.json", "a.txt", "a.TXT"):
        (tmp_path / name).write_text("{}")
    os.symlink(tmp_path / "gone", tmp_path / "h.jpg")
    os.mkfifo(tmp_path / "i.jpg")
    expected = {
        "'.heic' files": 2,
        "files without an extension": 1,
        ".txt files without an image": 1,
        "other .txt files of an image": 1,
        ".json files without an image": 1,
        "hidden files": 1,
        "hidden folders": 1,
        "links to nothing": 1,
        "devices and the like": 1,
    }
    found, left_out, said = pairs(tmp_path)
    assert (list(found), left_out) == (["a", "deep/b"], expected)
    assert f"2 '.heic' files, the first '{tmp_path}/d.heic'" in str(said)
    halves = [pairs(tmp_path, lambda key, side=side: (hash(key) % 2 == 0) == side)[1] for side in (True, False)]
    assert {kind: sum(half.get(kind, 0) for half in halves) for kind in expected} == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"folder '.*closed' cannot be read"):
        pairs(tmp_path)


def test_texts_of_other_names_are_counted_where_they_are_not_the_caption(tmp_path):
    image(tmp_path / "a.jpg")
    for name in ("a.txt", "a.caption.txt", "a.Title", "b.caption.txt"):
        (tmp_path / name).write_text(name)
    left_out = LeftOut()
    found = [pair.caption for pair in folder_pairs(tmp_path, "caption.txt", left_out, lambda key: True)]
    assert found == ["a.caption.txt"]
    kinds = {"'.title' files": 1, "other .txt files of an image": 1, ".txt files without an image": 1}
    assert {kind: count for kind, (count, _) in left_out.kinds.items()} == kinds
    assert pairs(tmp_path)[0] == {"a": ("jpg", "a.txt")}
