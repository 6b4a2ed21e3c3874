"""Captions in columns of every type and name that people write, each against the values that were written."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mug.data.captions import captions
from mug.data.errors import DataError
from mug.data.index.columnar import Groups, find_columns, scan_columnar
from mug.data.index.rows import IMAGE, JSON, TEXT

JPG = pa.array([b"one", b"two", b"three"])
STRINGS = ["a dog", None, "ein Hund"]
LISTS = [["a dog", "the dog"], None, ["ein Hund", None, ""]]
ITEM = pa.struct([("id", pa.int64()), ("raw", pa.string())])
OBJECT = pa.struct([("width", pa.int64()), ("caption", pa.string())])

PLAIN = [["a dog"], [], ["ein Hund"]]
SEVERAL = [["a dog", "the dog"], [], ["ein Hund"]]
OBJECTS = [{"width": 1, "caption": "a dog"}, None, {"width": 2, "caption": "ein Hund"}]
ITEMS = [[{"id": 1, "raw": "a dog"}, {"id": 2, "raw": "the dog"}], [], [{"id": 3, "raw": "ein Hund"}]]

COLUMNS = {
    "string": (pa.array(STRINGS), PLAIN),
    "large string": (pa.array(STRINGS, pa.large_string()), PLAIN),
    "string view": (pa.array(STRINGS, pa.string_view()), PLAIN),
    "binary": (pa.array(STRINGS).cast(pa.binary()), PLAIN),
    "binary view": (pa.array(STRINGS).cast(pa.binary()).cast(pa.binary_view()), PLAIN),
    "dictionary": (pa.array(STRINGS).dictionary_encode(), PLAIN),
    "dictionary of large strings": (pa.array(STRINGS, pa.large_string()).dictionary_encode(), PLAIN),
    "list": (pa.array(LISTS), SEVERAL),
    "large list": (pa.array(LISTS, pa.large_list(pa.string())), SEVERAL),
    "list of fixed size": (pa.array([["a dog", "the dog"], None, ["ein Hund", ""]], pa.list_(pa.string(), 2)), SEVERAL),
    "list of binary": (pa.array([[b"a dog", b"the dog"], None, [b"ein Hund"]]), SEVERAL),
    "struct": (pa.array(OBJECTS, OBJECT), PLAIN),
    "struct with one text": (pa.array([{"n": 1, "w": "a dog"}, None, {"n": 2, "w": "ein Hund"}]), PLAIN),
    "list of structs": (pa.array(ITEMS, pa.list_(ITEM)), SEVERAL),
}


def write(path, table: pa.Table, format: str):
    if format == "parquet":
        pq.write_table(table, path, row_group_size=2)
        return path
    new = pa.ipc.new_stream if format == "stream" else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def read(path, caption: str | None = None) -> list[list[str]]:
    """The captions of each row, as training chooses among them."""
    scan, groups, data = scan_columnar(path, caption), Groups(caption=caption), path.read_bytes()

    def value(row: dict, part: int, name: str) -> bytes:
        offset, length = row[f"{name}_offset"], row[f"{name}_length"]
        if length < 0:
            return b""
        return data[offset : offset + length] if scan.format == "arrow" else groups.read(path, part, offset, length)

    rows = scan.rows.to_pylist()
    assert [value(row, IMAGE, "image") for row in rows] == JPG.to_pylist()
    found = [captions(value(row, TEXT, "text"), value(row, JSON, "json"), ("en",)) for row in rows]
    assert "json" in scan.seen or scan.no_caption == sum(not one for one in found)
    return found


@pytest.mark.parametrize("format", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize("type", COLUMNS)
def test_every_type_with_one_meaning_is_read(tmp_path, type, format):
    column, expected = COLUMNS[type]
    path = write(tmp_path / "shard", pa.table({"jpg": JPG, "caption": column}), format)
    assert read(path) == expected


@pytest.mark.parametrize("name", ["TEXT", "Caption", "prompt", "caption_0", "alt_text", "alt", "title", "captions"])
def test_usual_names_in_any_case(tmp_path, name):
    table = pa.table({"url": ["u"] * 3, "jpg": JPG, name: STRINGS, f"{name}_hash": ["x"] * 3})
    path = write(tmp_path / "shard", table, "parquet")
    assert read(path) == PLAIN
    assert f"{name} (string)" in scan_columnar(path).seen


@pytest.mark.parametrize("format", ["parquet", "arrow", "stream"])
def test_an_object_of_json_is_read_where_there_is_no_other_caption(tmp_path, format):
    json = pa.array(OBJECTS, OBJECT)
    assert read(write(tmp_path / "a", pa.table({"jpg": JPG, "json": json}), format)) == PLAIN
    both = pa.table({"jpg": JPG, "json": json, "txt": ["x", "y", "z"]})
    assert read(write(tmp_path / "b", both, format)) == [["x"], ["y"], ["z"]]


@pytest.mark.parametrize(
    "column", [pa.array([1.5, float("nan"), None]), pa.array([1, 2, 3]), pa.array([True, False, None]), pa.nulls(3)]
)
def test_numbers_are_no_captions_and_are_named(tmp_path, column):
    path = write(tmp_path / "shard", pa.table({"jpg": JPG, "caption": column}), "parquet")
    assert read(path) == [[], [], []]
    assert scan_columnar(path).seen == f"columns jpg (binary), caption ({column.type})"


def test_plain_text_under_a_later_name_comes_before_a_list(tmp_path):
    """As shards with both were read, and indexed, before lists were."""
    table = pa.table({"jpg": JPG, "caption": LISTS, "text": ["x", "y", "z"], "TXT": STRINGS})
    path = write(tmp_path / "shard", table, "parquet")
    assert read(path) == [["x"], ["y"], ["z"]]
    assert scan_columnar(path).choice == "column 'text', not 'TXT', 'caption'"


@pytest.mark.parametrize("format", ["parquet", "arrow", "stream"])
def test_an_option_names_the_column(tmp_path, format):
    table = pa.table({"jpg": JPG, "caption": ["x", "y", "z"], "blurb": LISTS, "n": [1, 2, 3]})
    path = write(tmp_path / "shard", table, format)
    assert read(path, "blurb") == SEVERAL
    assert scan_columnar(path, "blurb").choice == ""
    for name in ("n", "Blurb"):
        with pytest.raises(DataError, match=rf"no text in a column '{name}'.* blurb \(list\)"):
            scan_columnar(path, name)


def test_no_image_column_says_what_there_is(tmp_path):
    table = pa.table({"img": [b"x"], "caption": ["a"], **{f"c{i}": [i] for i in range(30)}})
    with pytest.raises(DataError, match=r"no image column.* has columns img \(binary\), caption.* and 12 more"):
        find_columns(table.schema)


def test_images_under_a_name_in_capitals(tmp_path):
    table = pa.table({"JPG": JPG.cast(pa.binary_view()), "TEXT": STRINGS})
    assert read(write(tmp_path / "shard", table, "arrow")) == PLAIN
