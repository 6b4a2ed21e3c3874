"""A shard that is not the one that was indexed is refused by name, however it was opened; copies of it are not."""

import io
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded import tar_bytes
from faulty_server import Answer, Server, files

from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.index import tar
from mug.data.index.build import build_index
from mug.data.reader import Reader
from mug.data.store.identity import Identity

N = 12
CHANGED = r"shard '.*shard\.\w+'.*changed since it was indexed: rerun index_shards"


def image(i: int) -> bytes:
    return b"BM" + bytes([i]) * 700


def captions(words: str) -> list[str]:
    return [f"{words} {i:02d}" for i in range(N)]


def tar_of(texts: list[str], order=range(N), name="{:06d}", format=tarfile.USTAR_FORMAT) -> bytes:
    pairs = ((name.format(i), image(i), texts[i].encode()) for i in order)
    return tar_bytes((file for key, bmp, txt in pairs for file in ((f"{key}.bmp", bmp), (f"{key}.txt", txt))), format)


def columnar(kind: str, texts: list[str], order=range(N)) -> bytes:
    table = pa.table({"image": [image(i) for i in order], "caption": [texts[i] for i in order]})
    buffer = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer, row_group_size=5, compression="none", use_dictionary=False)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd" if kind == "arrow_batches" else None)
        with pa.ipc.new_file(buffer, table.schema, options=options) as writer:
            writer.write_table(table, 5)
    return buffer.getvalue()


def indexed(folder: Path, data: bytes, name: str = "shard.tar") -> Path:
    """The index of the shard, which is written."""
    (folder / name).write_bytes(data)
    (shard,) = build_index([str(folder / name)], folder / "index", 0)
    assert shard.failure == ""
    return folder / "index"


def opened(index: Path, cache: Path, **config) -> Reader:
    return Reader.open(str(index), DataConfig(cache=str(cache), **config))


def texts(reader: Reader) -> list[str]:
    """All captions; each sample's image is the one it should be with."""
    found = [reader.read(0, row) for row in range(N)]
    assert all(image_[2] == int(text[-2:]) for image_, text, _ in found)
    return [text.decode() for _, text, _ in found]


SHORT = tar_of(captions("a barn"))
APPENDED = io.BytesIO(SHORT)
with tarfile.open(fileobj=APPENDED, mode="a") as archive:  # into the padding
    archive.addfile(tarfile.TarInfo("more.bmp"))
OTHER_TARS = {
    "longer captions": tar_of(captions("a wide barn under falling snow")),
    "shorter captions": tar_of(captions("b")),
    "another order": tar_of(captions("a barn"), range(N - 1, -1, -1)),
    "other keys": tar_of(captions("a barn"), name="1{:05d}"),
    "one more file": APPENDED.getvalue(),
    "zeros": bytes(len(SHORT)),
    "noise": np.random.default_rng(0).bytes(len(SHORT)),
}


@pytest.mark.parametrize("when", ["before it is opened", "written over", "replaced", "replaced, opened again"])
@pytest.mark.parametrize("name", OTHER_TARS)
def test_a_tar_written_again_at_its_size_is_refused(tmp_path, name, when):
    assert len(OTHER_TARS[name]) == len(SHORT)
    index, shard = indexed(tmp_path, SHORT), tmp_path / "shard.tar"
    reader = opened(index, tmp_path)
    if when != "before it is opened":
        assert texts(reader) == captions("a barn")
    if when.startswith("replaced"):
        (tmp_path / "new").write_bytes(OTHER_TARS[name])
        os.replace(tmp_path / "new", shard)
        assert texts(reader) == captions("a barn")  # it holds what it has opened
        if when == "replaced":
            return
        reader = opened(index, tmp_path)
    else:
        before = shard.stat()
        with open(shard, "r+b") as file:
            file.write(OTHER_TARS[name])
        if when == "before it is opened":
            os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # content decides, not time
    with pytest.raises(DataError, match=CHANGED):
        texts(reader)


@pytest.mark.parametrize("kind", ["arrow", "arrow_batches", "parquet"])
def test_a_table_written_again_at_its_size_is_refused(tmp_path, kind):
    lengths = [f"{'a' * (i % 3 + 1)} {i:02d}" for i in range(N)]
    other = [f"{'b' * ((i + 1) % 3 + 1)} {i:02d}" for i in range(N)]
    data, changed = columnar(kind, lengths), columnar(kind, other)
    changed = changed if len(data) == len(changed) else data[:-200] + bytes(100) + data[-100:]
    index, shard = (
        indexed(tmp_path, data, f"shard.{kind.partition('_')[0]}"),
        tmp_path / f"shard.{kind.partition('_')[0]}",
    )
    reader = opened(index, tmp_path)
    assert reader.index.formats == [kind] and texts(reader) == lengths
    shard.write_bytes(changed)
    for one in (reader, opened(index, tmp_path)):
        with pytest.raises(DataError, match=CHANGED):
            texts(one)
    shard.write_bytes(data)
    assert texts(reader) == lengths


@pytest.mark.parametrize("kind", ["tar", "arrow", "arrow_batches", "parquet"])
def test_copies_and_touched_shards_are_read(tmp_path, kind):
    data = SHORT if kind == "tar" else columnar(kind, captions("a barn"))
    index = indexed(tmp_path, data, "shard." + kind)
    reader = opened(index, tmp_path)
    assert texts(reader) == captions("a barn")
    shutil.copy(tmp_path / f"shard.{kind}", tmp_path / "copy")
    os.utime(tmp_path / "copy", (1, 1))
    os.replace(tmp_path / "copy", tmp_path / f"shard.{kind}")
    for one in (reader, opened(index, tmp_path)):
        assert texts(one) == captions("a barn")
    os.utime(tmp_path / f"shard.{kind}")
    assert texts(reader) == captions("a barn")


def test_an_index_without_seals_is_read_and_its_tars_are_compared(tmp_path):
    """As it was written before there were any."""
    index = indexed(tmp_path, SHORT)
    with pa.ipc.open_file(index / "manifest.arrow") as file:
        batch = file.get_batch(0)
    older = batch.select([name for name in batch.schema.names if name != "seal"])
    with pa.ipc.new_file(index / "manifest.arrow", older.schema) as writer:
        writer.write_batch(older)
    assert texts(opened(index, tmp_path)) == captions("a barn")
    (tmp_path / "shard.tar").write_bytes(OTHER_TARS["longer captions"])
    with pytest.raises(DataError, match=CHANGED):
        texts(opened(index, tmp_path))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name", ["{:06d}", "deep/er/{:06d}", "n" * 98 + "{:02d}", "d/" * 60 + "{:06d}", "Höhe-高-{:02d}"]
)
def test_names_of_every_kind_are_known_by_their_headers(tmp_path, name, format, monkeypatch):
    if format == tarfile.USTAR_FORMAT and name.startswith("nn"):
        pytest.skip("ustar has no place for it")
    reader = opened(indexed(tmp_path, tar_of(captions("a barn"), name=name, format=format)), tmp_path)
    scans, is_same_tar = [], Identity.is_same_tar
    monkeypatch.setattr(Identity, "is_same_tar", lambda *a: scans.append(a) or is_same_tar(*a))
    assert texts(reader) == captions("a barn")
    assert len(scans) <= ("Höhe" in name and format == tarfile.PAX_FORMAT)  # the one kind of which headers know no name
    with open(tmp_path / "shard.tar", "r+b") as file:
        file.write(tar_of(captions("c"), name=name, format=format))
    with pytest.raises(DataError, match=CHANGED):
        texts(reader)


def without_etags(contents: dict[str, bytes]):
    serve = files(contents)

    def answer(*request) -> Answer:
        answer = serve(*request)
        return replace(answer, headers={name: value for name, value in answer.headers.items() if name != "ETag"})

    return answer


@pytest.mark.parametrize("remote", ["cache", "ranged"])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_shard_of_a_server_without_etags(tmp_path, remote, kind):
    if (kind, remote) == ("parquet", "ranged"):
        pytest.skip("is read as a whole")
    data = SHORT if kind == "tar" else columnar(kind, captions("a barn"))
    changed = OTHER_TARS["longer captions"] if kind == "tar" else data[:-200] + bytes(100) + data[-100:]
    contents = {f"/shard.{kind}": data}
    with Server(without_etags(contents)) as server:
        (shard,) = build_index([f"{server.url}/shard.{kind}"], tmp_path / "index", 0)
        assert (shard.failure, shard.stamp.etag) == ("", "")
        for _ in range(2):
            assert texts(opened(tmp_path / "index", tmp_path, remote=remote)) == captions("a barn")
        contents[f"/shard.{kind}"] = changed
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        with pytest.raises(DataError, match=CHANGED):
            texts(opened(tmp_path / "index", tmp_path, remote=remote, retry_seconds=1))
        contents[f"/shard.{kind}"] = data  # what was fetched meanwhile is not kept
        assert texts(opened(tmp_path / "index", tmp_path, remote=remote)) == captions("a barn")


def test_a_header_is_distinguished_from_a_body():
    data = tar_of(captions("a barn"))
    assert tar.is_header(data[:512]) and tar.is_header_of(data[:512], "000000", len(image(0)))
    assert not tar.is_header(data[512:1024]) and not tar.is_header(b"") and not tar.is_header(bytes(512))
    assert not tar.is_header_of(data[:512], "00000", len(image(0)))
    assert not tar.is_header_of(data[:512], "000000", len(image(0)) + 1)
    assert not tar.is_header_of(bytes(512), "000000", 0)


@pytest.mark.parametrize("kind", ["tar", "arrow"])
def test_an_index_of_captions_by_name_is_compared_with_these(tmp_path, kind):
    """The headers of this tar know no names, so a scan compares it, as one does the places in an Arrow file."""
    path, words = tmp_path / f"shard.{kind}", captions("a barn")
    if kind == "tar":
        files = [(f"Höhe-高-{i:02d}.{end}", image(i) if end == "bmp" else words[i].encode())
                 for i in range(N) for end in ("bmp", "blurb.txt")]  # fmt: skip
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in files:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        table = pa.table({"image": [image(i) for i in range(N)], "caption": ["x"] * N, "blurb": words})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, 5)
    (shard,) = build_index([str(path)], tmp_path / "index", 0, caption="blurb.txt" if kind == "tar" else "blurb")
    assert (shard.failure, shard.format) == ("", kind)
    assert texts(opened(tmp_path / "index", tmp_path)) == words
