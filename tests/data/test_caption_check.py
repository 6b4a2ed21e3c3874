"""What is reported of captions that are missing or cannot be read, against shards whose captions are known."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mug.data.builders.writers import write_tar
from mug.data.caption_check import CaptionReader, caption_warnings
from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.index import build
from mug.data.index.build import build_index, index_for
from mug.data.index.index import Index
from mug.data.reader import Reader

FINGERPRINT = "05537524299d650ca1cd277345091dcedad4a87bab9b5e3b7b4ba44f8ed476ff"


def reader_of(tmp_path, *members: tuple[str, bytes], **config) -> Reader:
    write_tar(tmp_path / "shard.tar", list(members))
    return Reader.open(f"{tmp_path}/shard.tar", DataConfig(cache=str(tmp_path / "cache"), **config))


def images(n: int) -> list[tuple[str, bytes]]:
    return [(f"{i}.jpg", b"image") for i in range(n)]


def test_captions_that_are_there_are_no_matter(tmp_path):
    texts = [(f"{i}.txt", b"a dog") for i in range(2)]
    others = [("2.json", b'{"TEXT": "a dog"}')]
    assert caption_warnings(reader_of(tmp_path, *images(4), *texts, *others), ("en",)) == []


def test_few_captions_are_reported_with_what_is_there(tmp_path):
    empty = [("1.txt", b" \n"), ("2.txt", b""), ("3.json", b'{"url": "u"}')]
    reader = reader_of(tmp_path, *images(4), ("0.txt", b"a dog"), *empty, ("0.cls", b"3"), ("1.cls", b"4"))
    (line,) = caption_warnings(reader, ("en",))
    assert line.startswith("only 1 of 4 samples read have a caption; the shards have files .jpg, .txt, .cls, .json")
    assert "set data.caption to" in line


def test_columns_are_reported_by_name_and_type(tmp_path):
    pq.write_table(pa.table({"jpg": [b"x"] * 3, "blurb": ["a"] * 3, "caption": [1.0] * 3}), tmp_path / "a.parquet")
    cache = {"cache": str(tmp_path / "cache")}
    reader = Reader.open(f"{tmp_path}/a.parquet", DataConfig(**cache))
    (line,) = caption_warnings(reader, ("en",))
    assert "none of 3" in line and "columns jpg (binary), blurb (string), caption (double)" in line
    named = Reader.open(f"{tmp_path}/a.parquet", DataConfig(caption="blurb", **cache))
    assert caption_warnings(named, ("en",)) == []
    assert named.read(0, 1) == (b"x", b"a", b"")
    assert named.index.fingerprint != reader.index.fingerprint


def test_what_cannot_be_decoded_or_parsed_is_counted(tmp_path):
    texts = [("0.txt", b"caf\xe9"), ("1.txt", "caf\u00e9".encode("utf-16")), ("2.txt", b"\xe9"), ("3.json", b"{")]
    reader = CaptionReader(reader_of(tmp_path, *images(4), *texts), ("en",))
    found = [reader.captions(0, row) for row in range(4)]
    assert found == [["caf\ufffd"], ["caf\u00e9"], ["\ufffd"], []]
    undecoded, damaged = reader.warnings()
    assert undecoded.startswith("2 of 3 captions read are not UTF-8") and undecoded.endswith("key '0'")
    assert damaged.startswith("1 of 4 samples read are unusable; the first: shard") and "key '3'" in damaged


def test_an_image_that_is_too_large_has_a_caption(tmp_path, monkeypatch):
    monkeypatch.setattr("mug.data.reader.MAX_BYTES", 4)
    reader = reader_of(tmp_path, ("0.jpg", b"image"), ("0.txt", b"a dog"), ("0.json", b"{}"))
    assert CaptionReader(reader, ("en",)).captions(0, 0) == ["a dog"]
    assert (reader.read_texts(0, 0), reader.read_json(0, 0)) == ((b"a dog", b"{}"), b"{}")
    with pytest.raises(DataError, match="of 5 bytes is more than 4"):
        reader.read(0, 0)


def make_older(index: Index) -> None:
    """Name the rows of an index, and record of them, as was usual before scans looked for as many names."""
    for i, name in enumerate(index.files):
        (index.folder / name).rename(index.folder / f"{i:05d}.arrow")
    with pa.ipc.open_file(index.folder / "manifest.arrow") as file:
        batch = file.get_batch(0)
    older = batch.select([name for name in batch.schema.names if name not in ("seal", "rows")])
    facts = {name: batch.schema.metadata[name] for name in (b"version", b"fingerprint")}
    with pa.ipc.new_file(index.folder / "manifest.arrow", older.schema.with_metadata(facts)) as writer:
        writer.write_batch(older.replace_schema_metadata(facts))


def test_an_older_index_is_read_by_its_folder_and_written_again_by_its_shards(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"i"), ("1.txt", b"a dog")])
    write_tar(tmp_path / "b.tar", [("2.jpg", b"i"), ("2.caption.txt", b"a dog")])
    now = index_for(f"{tmp_path}/*.tar", tmp_path / "cache")
    make_older(now)
    assert Index.open(now.folder).seen is None
    assert caption_warnings(Reader.open(str(now.folder), DataConfig()), ("en",)) == []
    again = index_for(f"{tmp_path}/*.tar", tmp_path / "cache")
    assert (again.folder, again.seen, again.fingerprint) == (now.folder, "", now.fingerprint)
    assert len(again.rows(1)) == 1


def test_an_index_keeps_to_the_captions_it_was_written_for(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"i"), ("1.txt", b"a dog"), ("1.blurb.txt", b"a cat")])
    urls, out = [f"{tmp_path}/a.tar"], str(tmp_path / "index")

    def text(**config) -> bytes:
        return Reader.open(out, DataConfig(**config)).read(0, 0)[1]

    assert not build_index(urls, Path(out), 0)[0].reused and text() == b"a dog"
    with pytest.raises(DataError, match=r"was not written for data\.caption blurb\.txt"):
        text(caption="blurb.txt")
    assert not build_index(urls, Path(out), 0, caption="blurb.txt")[0].reused
    assert text() == text(caption="blurb.txt") == b"a cat"
    assert build_index(urls, Path(out), 0, caption="blurb.txt")[0].reused


def test_one_odd_shard_is_named_and_the_others_are_indexed(tmp_path, monkeypatch):
    good, odd = [f"{tmp_path}/{name}.tar" for name in ("good", "odd")]
    named = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.tar")
    for path in (good, odd, named):
        write_tar(Path(path), [("1.jpg", b"i"), ("1.txt", b"a dog")])
    monkeypatch.setattr(
        build, "_scan", lambda source, *a, f=build._scan: f(source, *a) if source.url == good else 1 / 0
    )
    shards = build_index([odd, good, named], tmp_path / "index", 0)
    assert [shard.failure for shard in shards] == [
        f"shard '{odd}' cannot be read: ZeroDivisionError: division by zero",
        "",
        f"shard '{tmp_path}/\\xe9.tar' has a name that is not UTF-8: rename it",
    ]
    assert shards[1].count == 1


def test_folders_that_hold_no_index_say_what_they_are(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"i")])
    (tmp_path / "b.tar").write_bytes(b"")
    build_index([f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"], tmp_path / "index", 0)
    with pytest.raises(DataError, match=r"no finished index in '.*/index': .*run/index_shards\.py"):
        index_for(str(tmp_path / "index"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"is a folder without an index: give the shards in it, as '.*/\*\.tar'"):
        index_for(str(tmp_path), tmp_path / "cache")


def test_no_images_says_what_was_seen(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.txt", b"x"), ("1.npy", b"x"), ("2.npy", b"x")])
    with pytest.raises(DataError, match=r"no images in 1 shards, '.*a\.tar' the first, which has files \.npy, \.txt"):
        index_for(f"{tmp_path}/a.tar", tmp_path / "cache")


def test_fingerprints_are_those_of_before(tmp_path):
    """Of an index that was written before data.caption, of a tar and a Parquet whose captions were found then."""
    write_tar(tmp_path / "a.tar", [("1.jpg", b"i"), ("1.txt", b"a dog"), ("2.jpg", b"j"), ("2.json", b"{}")])
    table = {
        "jpg": [b"x", b"y"],
        "caption": ["a", None],
        "TEXT": ["b", "c"],
        "json": [{"i": 1}, None],
        "Key": ["p", "q"],
    }
    with pa.ipc.new_file(tmp_path / "b.arrow", pa.table(table).schema) as writer:
        writer.write_table(pa.table(table))
    assert index_for(f"{tmp_path}/a.tar,{tmp_path}/b.arrow", tmp_path / "cache").fingerprint == FINGERPRINT
