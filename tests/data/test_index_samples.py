"""From the files of a tar to samples; webdataset is the oracle where it groups files as we do."""

import tarfile

import pyarrow as pa
import pytest
import webdataset
from encoded import tar_bytes
from hypothesis import given
from hypothesis import strategies as st

from mug.data.errors import DataError
from mug.data.index import rows
from mug.data.index.tar_samples import UNUSED, scan_tar, split_names


def samples(data: bytes) -> tuple[list[tuple], dict[str, tuple]]:
    """(key, image, text, json) of each sample, bytes or None, read by offset; what was left out."""
    scan = scan_tar(lambda offset, length: data[offset : offset + length], len(data))

    def read(row, part):
        offset, length = row[f"{part}_offset"], row[f"{part}_length"]
        return data[offset : offset + length] if length >= 0 else None

    found = [(row["key"], *(read(row, part) for part in rows.PARTS)) for row in scan.rows.to_pylist()]
    return found, scan.left_out.kinds


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "a.txt", "a.json"], [("a", "a.jpg", "a.txt", "a.json")]),
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], [("a", "a.jpg", "a.txt", None), ("b", "b.jpg", "b.txt", None)]),
        (["a.txt", "b.jpg", "a.jpg"], [("a", "a.jpg", "a.txt", None), ("b", "b.jpg", None, None)]),
        (["d.1/a b.JPEG", "d.1/a b.Txt"], [("d.1/a b", "d.1/a b.JPEG", "d.1/a b.Txt", None)]),
        (["./é/ü.webp", "./é/ü.json"], [("./é/ü", "./é/ü.webp", None, "./é/ü.json")]),
        (["../up.png", "/root.gif"], [("../up", "../up.png", None, None), ("/root", "/root.gif", None, None)]),
        (["a.seg.png", "a.png", "b.tiff"], [("a", "a.png", None, None), ("b", "b.tiff", None, None)]),
        (["x/" + "long" * 60 + ".bmp"], [("x/" + "long" * 60, "x/" + "long" * 60 + ".bmp", None, None)]),
        ([".jpg", "d/.jpg", "jpg", "a.", "a.jpgx", "a.xjpg", "a.jpg/b"], []),
    ],
    ids=["all", "interleaved", "text first", "spaces", "UTF-8", "outside", "dots", "long", "no sample's"],
)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_used(names, expected, format):
    found, left_out = samples(tar_bytes([(name, name.encode()) for name in names], format))
    assert found == [tuple(x.encode() if i and x else x for i, x in enumerate(sample)) for sample in expected]
    used = sum(part is not None for sample in found for part in sample[1:])
    assert sum(count for count, _ in left_out.values()) == len(names) - used


def test_left_out_and_counted():
    data = tar_bytes([("1.txt", b"t"), ("2.jpg", b""), ("3.json", b"{}"), ("4.jpg", b"i")])
    left_out = {"keys without an image": (2, "'1'"), "images of 0 bytes": (1, "'2'")}
    assert samples(data) == ([("4", b"i", None, None)], left_out)
    assert samples(tar_bytes([("1.txt", b"")])) == ([], {"keys without a text": (1, "'1'")})
    assert samples(tar_bytes([])) == ([], {})


def test_what_belongs_to_no_sample_is_counted_by_kind():
    link, hard, folder = (tarfile.TarInfo(name) for name in ("link.jpg", "hard.jpg", "d"))
    link.type, hard.type, folder.type = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
    link.linkname = hard.linkname = "1.jpg"
    names = "1.jpg 1.mask.png barn_1.5m.jpg barn_1.5m.txt 1.licence.txt 1.heic 2.HEIC README d/._1.jpg 1.cls"
    found, left_out = samples(
        tar_bytes([*((name, b"x") for name in names.split()), *((one, b"") for one in (link, hard, folder))])
    )
    assert found == [("1", b"x", None, None), ("barn_1.5m", b"x", b"x", None)]
    assert left_out == {
        UNUSED: (2, "'1.mask.png'"),
        "'.heic' files": (2, "'1.heic'"),
        "files without an extension": (1, "'README'"),
        "hidden files": (1, "'d/._1.jpg'"),
        "'.cls' files": (1, "'1.cls'"),
        "links": (2, "'link.jpg'"),
    }


def test_kinds_beyond_twenty_are_counted_together():
    _, left_out = samples(tar_bytes([(f"1.x{i}", b"x") for i in range(50)]))
    assert len(left_out) == 21 and sum(count for count, _ in left_out.values()) == 50


def test_an_empty_caption_is_one():
    assert samples(tar_bytes([("1.jpg", b"i"), ("1.txt", b"")])) == ([("1", b"i", b"", None)], {})


@pytest.mark.parametrize(
    "twice", ["k.jpg k.txt k.jpg", "k.jpg k.png", "k.jpg k.txt o.jpg k.txt", "k.jpg k.json k.JSON"]
)
def test_a_key_twice_is_refused_by_name(twice):
    with pytest.raises(DataError, match="key 'k': write distinct keys"):
        samples(tar_bytes([(name, b"x") for name in twice.split()]))


def test_names_that_are_no_utf8():
    data = tar_bytes([("é.jpg", b"i")]).replace("é".encode(), b"\xff\xfe")
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert samples(bytes(header) + data[512:])[0] == [("\\xff\\xfe", b"i", None, None)]


def test_nothing_unpickles(tmp_path):
    """Members that webdataset's decoder would unpickle are no part of a sample."""
    canary = tmp_path / "ran"
    attack = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    extensions = ("pyd", "pkl", "pickle", "pth")
    data = tar_bytes([("1.jpg", b"i"), *((f"1.{extension}", attack) for extension in extensions)])
    found, left_out = samples(data)
    assert found == [("1", b"i", None, None)] and len(left_out) == 4
    assert not canary.exists()


@given(
    st.lists(
        st.tuples(st.text(st.sampled_from("ab/c "), min_size=1, max_size=12), st.sets(st.sampled_from("jtx"))),
        unique_by=lambda sample: sample[0],
        max_size=6,
    ).filter(lambda samples: not any(key.endswith("/") for key, _ in samples))
)
def test_groups_as_webdataset_does(tmp_path_factory, keys):
    names = {"j": "jpg", "t": "txt", "x": "json"}
    members = [(f"{key}.{names[p]}", f"{key} {p}".encode()) for key, parts in keys for p in sorted(parts)]
    data = tar_bytes(members)
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    path.write_bytes(data)
    oracle = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    found = [tuple(s.get(name) for name in ("__key__", "jpg", "txt", "json")) for s in oracle]
    expected = [sample for sample in found if sample[1]] or found  # without any image, a tar of texts
    assert samples(data)[0] == expected


def test_split_names_takes_slices():
    names = pa.array([b"skip.jpg", b"a/b.c/d.jpg", b"e.txt"])[1:]
    part, key_end = split_names(names)
    assert part.tolist() == [rows.IMAGE, rows.TEXT]
    assert key_end.tolist() == [7, 1]
