import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from encoded import tar_bytes

from mug.data.builders import writers
from mug.data.builders.writers import Sample, is_held_out, key_of, write_shards
from mug.data.errors import DataError


def sample(i: int, key: str | None = None, size: int = 200) -> Sample:
    image = np.random.default_rng(i).bytes(size + i)
    caption = "" if i % 5 == 4 else f"Bild {i}: Größe 猫"
    meta = {"caption": caption, "odd": "a\ud800b" if i == 3 else "", "number": i}
    return Sample(key or f"folder/{i:05d}", image, "jpg" if i % 2 else "png", caption, meta)


def write(folder, format: str, samples=None, per_shard: int = 10) -> list:
    folder.mkdir(exist_ok=True)
    return list(write_shards(samples or (sample(i) for i in range(23)), folder, "train-", format, per_shard))


def tables(folder, format: str) -> list[dict]:
    paths = sorted(folder.glob(f"*.{format}"))
    read = pyarrow.parquet.read_table if format == "parquet" else lambda p: pyarrow.ipc.open_file(p).read_all()
    return [row for path in paths for row in read(path).to_pylist()]


def test_a_tar_as_webdataset_reads_it(tmp_path):
    written = write(tmp_path, "tar")
    assert [(path.name, count) for path, count in written] == [
        ("train-00000.tar", 10), ("train-00001.tar", 10), ("train-00002.tar", 3)
    ]  # fmt: skip
    read = list(webdataset.WebDataset([str(path) for path, _ in written], shardshuffle=False))
    assert len(read) == 23
    for i, found in enumerate(read):
        given = sample(i)
        assert found["__key__"] == given.key and found[given.extension] == given.image
        assert found.get("txt", b"").decode() == given.caption and ("txt" in found) == bool(given.caption)
        assert json.loads(found["json"]) == given.meta | {"odd": "a?b" if i == 3 else ""}


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_a_table_holds_what_the_tar_holds(tmp_path, format):
    write(tmp_path, "tar")
    write(tmp_path, format)
    paths = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    for row, found in zip(tables(tmp_path, format), webdataset.WebDataset(paths, shardshuffle=False), strict=True):
        assert row["key"] == found["__key__"]
        assert row["image"] == (found.get("png") or found.get("jpg"))
        assert row["caption"] == (found["txt"].decode() if "txt" in found else None)
        assert row["json"].encode() == found["json"]


def test_images_in_an_arrow_file_can_be_read_in_place(tmp_path):
    ((path, _),) = write(tmp_path, "arrow", per_shard=100)
    with pyarrow.memory_map(str(path)) as file:
        start, images = file.read_buffer().address, pyarrow.ipc.open_file(file).get_batch(0)["image"]
        _, offsets, data = images.buffers()
        offsets = np.frombuffer(offsets, np.int32)
        for i in range(23):
            at = data.address - start + offsets[i]
            assert path.read_bytes()[at : at + len(sample(i).image)] == sample(i).image


def test_parquet_has_small_row_groups(tmp_path):
    ((path, _),) = write(tmp_path, "parquet", (sample(i) for i in range(250)), per_shard=300)
    meta = pyarrow.parquet.ParquetFile(path).metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [100, 100, 50]
    image = meta.row_group(0).column(1)
    assert image.compression == "UNCOMPRESSED" and image.statistics is None


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_large_images_end_a_batch_early(tmp_path, monkeypatch, format):
    monkeypatch.setattr(writers, "BATCH_BYTES", 10_000)
    ((path, _),) = write(tmp_path, format, (sample(i, size=3000) for i in range(10)))
    if format == "arrow":
        file = pyarrow.ipc.open_file(path)
        rows = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
    else:
        meta = pyarrow.parquet.ParquetFile(path).metadata
        rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    assert rows == [4, 4, 2]
    assert [row["image"] for row in tables(tmp_path, format)] == [sample(i, size=3000).image for i in range(10)]


@pytest.mark.parametrize("format", writers.WRITERS)
def test_the_same_samples_give_the_same_bytes(tmp_path, format):
    for folder in "ab":
        write(tmp_path / folder, format)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(names) == 6 and f"train-00002.{format}" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_stats_next_to_each_shard(tmp_path):
    write(tmp_path, "tar")
    stats = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*_stats.json"))]
    assert [(one["count"], one["successes"]) for one in stats] == [(10, 10), (10, 10), (3, 3)]


@pytest.mark.parametrize("format", writers.WRITERS)
def test_a_writer_that_breaks_off_leaves_whole_shards_only(tmp_path, format):
    def breaking():
        yield from (sample(i) for i in range(15))
        assert (tmp_path / f"train-00001.{format}.partial").exists()
        assert not (tmp_path / f"train-00001.{format}").exists()
        raise RuntimeError("the source went away")

    with pytest.raises(RuntimeError, match="went away"):
        write(tmp_path, format, breaking())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train-00000.{format}", "train-00000_stats.json"]


@pytest.mark.parametrize("key", ["", "a/", "a.b", "x/a.b", "/a", "../a", "a/../b", "a\0b", ".."])
def test_keys_that_could_not_be_read_back_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="cannot be a file's name"):
        write(tmp_path, "tar", [Sample(key, b"x", "png", "", {})])
    assert list(tmp_path.iterdir()) == []


def test_a_key_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="key 'k' comes twice"):
        write(tmp_path, "tar", [sample(0, "k"), sample(1, "k")])


def test_long_and_foreign_names(tmp_path):
    keys = ["d" * 150 + "/" + "k" * 150, "häuser/猫"]
    ((path, _),) = write(tmp_path, "tar", [sample(i, key) for i, key in enumerate(keys)])
    with tarfile.open(path) as tar:
        assert [m.name.rpartition(".")[0] for m in tar if m.name.endswith(".json")] == keys


def test_plain_names_are_written_as_ustar(tmp_path):
    members = [("a/b.png", b"12"), ("a/b.txt", b"")]
    writers.write_tar(tmp_path / "a.tar", members)
    assert (tmp_path / "a.tar").read_bytes() == tar_bytes(members, tarfile.USTAR_FORMAT)


def test_the_split_goes_by_the_name_alone():
    names = [f"key {i}" for i in range(4000)]
    held_out = {name for name in names if is_held_out(name, 0.25)}
    assert 0.22 < len(held_out) / 4000 < 0.28
    assert {name for name in names if is_held_out(name, 0.1)} < held_out
    assert not any(is_held_out(name, 0.0) for name in names)


def test_keys_of_paths(tmp_path):
    keys = [key_of(path.relative_to(tmp_path)) for path in (tmp_path / "a.b/c.d.jpeg", tmp_path / "e.png")]
    assert keys == ["a_b/c_d", "e"]
