import pytest
import webdataset

from mug.data.errors import DataError
from mug.data.shards import IMAGE, TEXT, ShardIndex, expand
from mug.data.writers import write_tar


def names(patterns: str) -> list[str]:
    return [path.name for path in expand(patterns)]


@pytest.fixture
def folder(tmp_path):
    for name in ["a-00.tar", "a-01.tar", "a-02.tar", "b.tar"]:
        write_tar(tmp_path / name, [("k.png", b"image"), ("k.txt", b"text")])
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-*.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-0{2..2}.tar", ["a-02.tar"]),
        ("{b,a-01}.tar", ["b.tar", "a-01.tar"]),
        ("b.tar,FOLDER/a-{00,02}.tar", ["b.tar", "a-00.tar", "a-02.tar"]),
        ("b.tar  FOLDER/a-*.tar\n", ["b.tar", "a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-0{0..1}.{tar,tar}", ["a-00.tar", "a-00.tar", "a-01.tar", "a-01.tar"]),
    ],
)
def test_expand(folder, pattern, expected):
    assert sorted(names(f"{folder}/{pattern.replace('FOLDER', str(folder))}")) == sorted(expected)


@pytest.mark.parametrize("pattern", ["none-*.tar", "a-{00..03}.tar", "a-{00..02.tar", "nothing.tar", ""])
def test_missing_shards_are_named(folder, pattern):
    with pytest.raises(DataError, match="missing shards"):
        expand(f"{folder}/{pattern}")


@pytest.mark.parametrize("pattern", ["pipe:touch FILE", "pipe:touch${IFS}FILE", "s3://bucket/a.tar", ""])
def test_nothing_but_local_paths(tmp_path, pattern):
    with pytest.raises(DataError, match=r"local paths|missing shards"):
        expand(pattern.replace("FILE", str(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


def test_reads_what_webdataset_reads(tmp_path, make_shards):
    paths = make_shards(tmp_path, [3, 4])
    index = ShardIndex.scan(paths)
    oracle = list(webdataset.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert len(index) == len(oracle) == 7
    for row, sample in enumerate(oracle):
        assert index.keys[row].decode() == sample["__key__"]
        assert index.read(row, IMAGE) == sample["png"]
        assert index.read(row, TEXT) == sample["txt"]


def test_names_with_folders_dots_and_great_length(tmp_path):
    long = "x" * 150  # longer than a tar header's field
    members = [("d.1/a.seg.png", b"0"), ("d.1/a.png", b"1"), ("d.1/a.txt", b"2"), (f"{long}/{long}.JPG", b"3")]
    with webdataset.TarWriter(str(tmp_path / "a.tar"), format="GNU_FORMAT") as tar:
        for name, data in members:
            key, _, extension = name.rpartition(".")
            tar.write({"__key__": key, extension: data})
    index = ShardIndex.scan([tmp_path / "a.tar"])
    assert index.keys.tolist() == [b"d.1/a", f"{long}/{long}".encode()]
    assert [index.read(row, IMAGE) for row in range(2)] == [b"1", b"3"]
    assert [index.read(row, TEXT) for row in range(2)] == [b"2", b""]


def test_a_pair_may_lack_its_caption_but_not_its_image(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [("1.png", b"image"), ("2.txt", b"text"), ("3.png", b"image"), ("3.txt", b"")])
    index = ShardIndex.scan([tmp_path / "a.tar"])
    assert index.keys.tolist() == [b"1", b"3"]
    assert [index.read(row, TEXT) for row in range(2)] == [b"", b""]
    assert "left out 1 keys" in caplog.text


@pytest.mark.parametrize("damage", ["member boundary", "inside a member", "not a tar", "empty"])
def test_damaged_shards_are_named(tmp_path, make_shards, damage):
    (path,) = make_shards(tmp_path, [3])
    whole = path.read_bytes()
    end = ShardIndex.scan([path]).spans[2, TEXT, 0]
    cut = {
        "member boundary": whole[: end + 512],
        "inside a member": whole[: end - 1000],
        "not a tar": b"PK" * 2000,
        "empty": b"",
    }
    path.write_bytes(cut[damage])
    with pytest.raises(DataError, match=r"train-00000\.tar.*anew"):
        ShardIndex.scan([path])


def test_a_file_twice_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.png", b"x"), ("1.png", b"y")])
    with pytest.raises(DataError, match=r"a\.tar', key '1'"):
        ShardIndex.scan([tmp_path / "a.tar"])


def test_shards_without_images_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.txt", b"x")])
    with pytest.raises(DataError, match="no images"):
        ShardIndex.scan([tmp_path / "a.tar"])


def test_a_shard_that_shrinks_or_goes_is_named(tmp_path, make_shards):
    (path,) = make_shards(tmp_path, [3])
    index = ShardIndex.scan([path])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"key '00001': the shard is shorter"):
        index.read(1, IMAGE)
    path.unlink()
    with pytest.raises(DataError, match=r"key '00001': cannot be read"):
        index.read(1, IMAGE)


def test_the_fingerprint_follows_content_not_place(tmp_path, make_shards):
    def fingerprint(folder, counts, prefix="train"):
        return ShardIndex.scan(make_shards(tmp_path / folder, counts, prefix)).fingerprint()

    base = fingerprint("a", [3, 4])
    assert fingerprint("b", [3, 4]) == base
    others = [fingerprint("c", [4, 3]), fingerprint("d", [3, 5]), fingerprint("e", [3, 4], "other")]
    assert len({base, *others}) == 4
