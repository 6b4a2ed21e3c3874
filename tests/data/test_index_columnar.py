"""The same pairs as tar, Arrow and Parquet index to the same samples, with the same bytes behind each."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded import encode, tar_bytes

from mug.data.errors import DataError
from mug.data.index import build, columnar
from mug.data.index.columnar import Groups, scan_columnar
from mug.data.index.rows import IMAGE, JSON, PARTS, TEXT
from mug.data.index.tar_samples import scan_tar

N = 40


def picture(i: int) -> bytes:
    noise = np.random.default_rng(i).integers(0, 256, (8 + i, 60 - i, 3), dtype=np.uint8)
    return encode(noise, ("JPEG", "PNG", "WEBP")[i % 3])


PAIRS = [
    {
        "key": f"{i:09d}",
        "jpg": picture(i) if i % 10 else None,
        "txt": f"Bild {i} ü" if i % 4 else None,
        "json": f'{{"i": {i}}}' if i % 7 else None,
    }
    for i in range(N)
]
KEPT = [pair for pair in PAIRS if pair["jpg"]]


def as_tar() -> bytes:
    files = ((f"{pair['key']}.{end}", pair[end]) for pair in PAIRS for end in ("jpg", "txt", "json") if pair[end])
    return tar_bytes((name, body if isinstance(body, bytes) else body.encode()) for name, body in files)


def write(path, kind: str, table: pa.Table):
    """`kind`: the format and what of it to use."""
    if kind.startswith("parquet"):
        pq.write_table(table, path, row_group_size=15, compression="none" if "plain" in kind else "zstd")
        return path
    compression = "zstd" if "compressed" in kind else None
    new = pa.ipc.new_stream if "stream" in kind else pa.ipc.new_file
    with new(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=15)
    return path


def read(path, scan) -> list[tuple]:
    """(key, image, text, json) of each row, by its place."""
    groups, data = Groups(limit=1), path.read_bytes()  # a limit that keeps one column at a time

    def value(row, part):
        offset, length = row[f"{PARTS[part]}_offset"], row[f"{PARTS[part]}_length"]
        if length < 0:
            return None
        by_group = scan.format in ("parquet", "arrow_batches")
        return groups.read(path, part, offset, length) if by_group else data[offset : offset + length]

    return [(row["key"], *(value(row, part) for part in (IMAGE, TEXT, JSON))) for row in scan.rows.to_pylist()]


EXPECTED = [
    (p["key"], p["jpg"], p["txt"].encode() if p["txt"] else None, p["json"].encode() if p["json"] else None)
    for p in KEPT
]


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("arrow", "arrow"),
        ("arrow stream", "arrow"),
        ("arrow compressed", "arrow_batches"),
        ("parquet", "parquet"),
        ("parquet plain", "parquet"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_the_same_samples_in_every_format(tmp_path, kind, format, large):
    table = pa.Table.from_pylist(PAIRS)
    if large:
        table = table.cast(
            pa.schema(
                [("key", "large_string"), ("jpg", "large_binary"), ("txt", "large_string"), ("json", "large_binary")]
            )
        )
    scan = scan_columnar(write(tmp_path / "shard", kind, table))
    assert (scan.format, scan.left_out.count) == (format, N - len(KEPT))
    assert read(tmp_path / "shard", scan) == EXPECTED
    data = as_tar()
    tar = scan_tar(lambda offset, length: data[offset : offset + length], len(data))
    assert scan.rows["key"].equals(tar.rows["key"])


@pytest.mark.parametrize("kind", ["arrow", "arrow stream", "parquet"])
def test_images_of_hugging_face_datasets(tmp_path, kind):
    """{bytes, path} structs, null as a whole or in their bytes; no key: the row's number; the json is no string."""
    images = [{"bytes": b"0", "path": "0.jpg"}, None, {"bytes": None, "path": "2.jpg"}, {"bytes": b"333", "path": None}]
    table = pa.table({"image": images, "json": [{"i": i} for i in range(4)], "text": [f"t{i}" for i in range(4)]})
    scan = scan_columnar(write(tmp_path / "shard", kind, table))
    assert scan.left_out.kinds == {"rows without an image": (2, "'000000001'")}
    assert read(tmp_path / "shard", scan) == [("000000000", b"0", b"t0", None), ("000000003", b"333", b"t3", None)]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_columns_as_img2dataset_writes_them(tmp_path, kind):
    """Failed downloads have a row without an image."""
    rows = [
        {"jpg": b"a", "key": "000000000", "caption": "A", "url": "u", "status": "success", "width": 1, "txt": "A"},
        {"jpg": None, "key": "000000001", "caption": "B", "url": "u", "status": "failed", "width": None, "txt": None},
        {"jpg": b"", "key": "000000002", "caption": "C", "url": "u", "status": "failed", "width": None, "txt": None},
        {"jpg": b"d", "key": None, "caption": "D", "url": "u", "status": "success", "width": 1, "txt": ""},
    ]
    scan = scan_columnar(write(tmp_path / "shard", kind, pa.Table.from_pylist(rows)))
    assert scan.left_out.kinds == {"rows without an image": (2, "'000000001'")}
    assert read(tmp_path / "shard", scan) == [("000000000", b"a", b"A", None), ("000000003", b"d", b"", None)]


def test_captions_by_dictionary_lie_in_no_one_place(tmp_path):
    table = pa.table({"jpg": [b"a", b"b"], "caption": pa.array(["x", "x"]).dictionary_encode()})
    scan = scan_columnar(write(tmp_path / "shard", "arrow", table))
    assert scan.format == "arrow_batches"
    assert read(tmp_path / "shard", scan) == [("000000000", b"a", b"x", None), ("000000001", b"b", b"x", None)]


@pytest.mark.parametrize("kind", ["arrow", "arrow stream", "parquet"])
def test_no_rows(tmp_path, kind):
    table = pa.Table.from_pylist(PAIRS).slice(0, 0)
    assert len(scan_columnar(write(tmp_path / "shard", kind, table)).rows) == 0


@pytest.mark.parametrize("kind", ["arrow", "arrow stream", "arrow compressed", "parquet"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.99])
def test_cut_files_are_refused(tmp_path, kind, part):
    whole = write(tmp_path / "shard", kind, pa.Table.from_pylist(PAIRS)).read_bytes()
    (tmp_path / "shard").write_bytes(whole[: max(9, int(part * len(whole)))])
    with pytest.raises(DataError, match="fetch or rewrite it"):
        scan_columnar(tmp_path / "shard")


def test_a_stream_cut_between_batches_is_refused(tmp_path):
    path = write(tmp_path / "shard", "arrow stream", pa.Table.from_pylist(PAIRS))
    path.write_bytes(path.read_bytes()[:-8])
    assert pa.ipc.open_stream(path).read_all().num_rows == N  # which the oracle does not notice
    with pytest.raises(DataError, match="no end mark"):
        scan_columnar(path)


@pytest.mark.parametrize(
    ("columns", "kind", "reason"),
    [
        ({"url": ["u"], "width": [3]}, "parquet", "no image column"),
        ({"image": ["a path"]}, "arrow", "no image column"),
        ({"image": [[b"several"]]}, "parquet", "no image column"),
        ({"jpg": [b"x" * 1000]}, "arrow stream compressed", "stream with compressed"),
    ],
)
def test_refused(tmp_path, columns, kind, reason):
    with pytest.raises(DataError, match=reason):
        scan_columnar(write(tmp_path / "shard", kind, pa.table(columns)))


def test_offsets_that_point_anywhere_are_refused(tmp_path):
    path = write(tmp_path / "shard", "arrow", pa.table({"jpg": [b"abc", b"defg"]}))
    data = path.read_bytes()
    offsets = np.array([0, 3, 7], np.int32).tobytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, np.array([0, 3, 2**30], np.int32).tobytes()))
    with pytest.raises(DataError, match="cannot be read"):
        scan_columnar(path)


def test_groups_keep_to_their_limit(tmp_path):
    table = pa.table({"jpg": [bytes(1000)] * 40, "txt": ["t"] * 40})
    path = write(tmp_path / "shard", "parquet", table)
    groups = Groups(limit=40_000)
    for group, row in [(0, 0), (1, 14), (2, 9), (0, 3)]:
        assert groups.read(path, IMAGE, group, row) == bytes(1000)
        assert groups.held == sum(column.nbytes for column in groups.decoded.values()) <= 40_000
    assert [key[2] for key in groups.decoded] == [2, 0]
    with pytest.raises(DataError, match="group 0, row 15"):
        groups.read(path, IMAGE, 0, 15)


def groups_of(path, images: pa.Array | pa.ChunkedArray, rows: int, **options) -> Path:
    table = pa.table({"image": images, "caption": [f"a hill {i}" for i in range(len(images))]})
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_row_group_that_cannot_be_read_as_one_is_refused(tmp_path, monkeypatch, dictionary):
    monkeypatch.setattr(columnar, "MAX_GROUP", 40_000)  # of 2 GiB
    monkeypatch.setattr(columnar, "BATCH", 8)
    images = pa.array([picture(0) + bytes(2000)] * 32)
    path = groups_of(tmp_path / "a.parquet", images, 1000, use_dictionary=dictionary, compression="zstd")
    with pytest.raises(DataError, match=r"holds more than 0\.0 GB of images in its row group 0, .*row_group_size=100"):
        scan_columnar(path)
    structs = pa.StructArray.from_arrays([images, pa.array(["x"] * 32)], ["bytes", "path"])
    with pytest.raises(DataError, match="in its row group 0"):
        scan_columnar(groups_of(tmp_path / "b.parquet", structs, 1000, use_dictionary=dictionary))
    assert len(scan_columnar(groups_of(tmp_path / "c.parquet", images, 10)).rows) == 32
    assert len(scan_columnar(groups_of(tmp_path / "d.parquet", images.cast(pa.large_binary()), 1000)).rows) == 32


def test_large_row_groups_are_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build, "LARGE_GROUP", 10_000)
    images = pa.array([picture(0) + bytes(2000)] * 32)
    paths = [groups_of(tmp_path / f"{rows}.parquet", images, rows) for rows in (2, 10, 16)]
    shards = build.build_index([str(path) for path in paths], tmp_path / "index", 0)
    assert [shard.group_bytes // len(images[0].as_py()) for shard in shards] == [2, 10, 16]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"2 shards have large row groups: to read one sample of '{paths[1]}', 0.0 GB are decoded")


@pytest.mark.slow
def test_a_row_group_beyond_2_gib_is_refused(tmp_path):
    images = pa.chunked_array([pa.array([picture(0) + bytes(2**20)] * 100)] * 21)
    path = groups_of(tmp_path / "big.parquet", images, 10**6, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"holds more than 2\.1 GB of images in its row group 0"):
        scan_columnar(path)
