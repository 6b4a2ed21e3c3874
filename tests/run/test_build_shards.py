"""run/build_shards.py as users start it; the shards read back by webdataset and pyarrow."""

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from commands import run_script
from encoded import encode
from PIL import Image

from mug.data.builders.raw_pairs import parquet_pairs
from mug.data.index.build import index_for

ROOT = Path(__file__).parents[2]


def build(*arguments: object) -> subprocess.CompletedProcess:
    return run_script("run/build_shards.py", *arguments)


def built(*arguments: object) -> str:
    """Returns what a build says that ends well."""
    done = build(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(folder: Path, split: str = "train") -> dict[str, dict]:
    """key → the files of a sample."""
    paths = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(paths, shardshuffle=False)} if paths else {}


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder as people have them."""
    folder = tmp_path / "photos"
    for label in ("cats/black", "dogs"):
        (folder / label).mkdir(parents=True)
    (folder / "a.v2.png").write_bytes(encode(Image.new("RGB", (40, 30), "red")))
    (folder / "a.v2.txt").write_bytes(b"caf\xc3\xa9 \xff\0")
    (folder / "cats/black/1.JPG").write_bytes(encode(Image.new("RGB", (200, 100), "blue"), "JPEG"))
    (folder / "cats/black/1.json").write_text('{"captions": {"de": "Katze"}, "caption": "a cat", "width": 9}')
    (folder / "dogs/2.webp").write_bytes(encode(Image.new("RGB", (20, 20)), "WEBP"))
    (folder / "dogs/2.json").write_text('{"label": "poodle", "x": [')
    (folder / "dogs/3.png").write_bytes(b"<html>")
    (folder / "dogs/notes.txt").write_text("no image")
    return folder


def test_a_folder(photos, tmp_path):
    lines = built("folder", photos, "--out", tmp_path / "out", "--held_out", "0").splitlines()
    assert lines[-1] == (
        "3 pairs, 2 with a caption; left out: 1 images that cannot be used, the first 'dogs/3': "
        f"not PNG, JPEG, WebP, GIF, BMP or TIFF; 1 .txt files without an image, the first '{photos}/dogs/notes.txt'"
    )
    assert any("2.webp: its json does not hold an object" in line for line in lines)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train-00000.tar", "train-00000_stats.json"}
    pairs = read(tmp_path / "out")
    assert list(pairs) == ["a_v2", "cats/black/1", "dogs/2"]
    assert pairs["a_v2"]["png"] == (photos / "a.v2.png").read_bytes()
    assert pairs["a_v2"]["txt"].decode() == "café \ufffd"
    metas = {key: json.loads(pair["json"]) for key, pair in pairs.items()}
    assert metas["a_v2"] == {"key": "a_v2", "caption": "café \ufffd", "width": 40, "height": 30}
    assert pairs["cats/black/1"]["jpg"] == (photos / "cats/black/1.JPG").read_bytes()
    assert pairs["cats/black/1"]["txt"] == b"a cat"
    cat = metas["cats/black/1"]
    assert (cat["label"], cat["captions"], cat["width"]) == ("cats/black", {"de": "Katze"}, 200)
    assert metas["dogs/2"]["label"] == "dogs" and "txt" not in pairs["dogs/2"]


def test_large_images_shrink_as_jpeg(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    turned = Image.new("RGB", (200, 100), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (folder / "turned.jpg").write_bytes(encode(turned, "JPEG", exif=exif))
    (folder / "clear.png").write_bytes(encode(Image.new("RGBA", (300, 90), (0, 0, 0, 0))))
    (folder / "grey16.png").write_bytes(encode(Image.fromarray(np.full((90, 90), 128 << 8, np.uint16))))
    (folder / "small.png").write_bytes(encode(Image.new("RGB", (64, 10))))
    built("folder", folder, "--out", tmp_path / "out", "--held_out", "0", "--image_size", "64")
    pairs = read(tmp_path / "out")
    assert pairs["small"]["png"] == (folder / "small.png").read_bytes()
    images = {key: Image.open(io.BytesIO(pair["jpg"])) for key, pair in pairs.items() if "jpg" in pair}
    assert {key: image.size for key, image in images.items()} == {
        "clear": (64, 19), "grey16": (64, 64), "turned": (32, 64)
    }  # fmt: skip
    assert images["clear"].getpixel((5, 5)) == (255, 255, 255)
    assert images["grey16"].convert("RGB").getpixel((5, 5)) == pytest.approx((128, 128, 128), abs=2)
    assert all(json.loads(pairs[key]["json"])["height"] == image.height for key, image in images.items())


def test_the_split_and_the_formats(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / f"in/{i:02d}.png").write_bytes(encode(Image.fromarray(noise)))
        (tmp_path / f"in/{i:02d}.txt").write_text(f"picture {i}")
    share = ("--held_out", "0.3", "--samples_per_shard", "20")
    for format in ("tar", "arrow", "parquet"):
        built("folder", tmp_path / "in", "--out", tmp_path / format, "--format", format, *share)
    train, held_out = read(tmp_path / "tar"), read(tmp_path / "tar", "held_out")
    assert sorted([*train, *held_out]) == [f"{i:02d}" for i in range(40)] and 4 < len(held_out) < 20
    for split, samples in (("train", train), ("held_out", held_out)):
        arrow = [pyarrow.ipc.open_file(p).read_all() for p in sorted((tmp_path / "arrow").glob(f"{split}-*.arrow"))]
        parquet = [pyarrow.parquet.read_table(p) for p in sorted((tmp_path / "parquet").glob(f"{split}-*.parquet"))]
        for tables in (arrow, parquet):
            rows = pyarrow.concat_tables(tables).to_pylist()
            assert [(row["key"], row["image"], row["caption"].encode(), row["json"].encode()) for row in rows] == [
                (key, sample["png"], sample["txt"], sample["json"]) for key, sample in samples.items()
            ]


def parquet_of(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_of_bytes(tmp_path):
    images = [encode(Image.new("RGB", (8 + i, 8))) for i in range(4)]
    (tmp_path / "in").mkdir()
    parquet_of(
        tmp_path / "in/0.parquet",
        jpg=[images[0], None],  # img2dataset writes a row for a download that failed
        caption=["first", "gone"],
        key=["0.0", "01"],
        width=[1, 2],
        similarity=[0.5, 0.7],
        label=[float("nan"), 1.0],  # as pandas writes a missing one
    )
    datasets = [{"bytes": image, "path": None} for image in images[2:]]  # as Hugging Face datasets write them
    parquet_of(tmp_path / "in/1.parquet", image=datasets, text=["third", None], label=[7, 8], json=['{"a": [1]}', "["])
    said = built("parquet", tmp_path / "in", "--out", tmp_path / "out", "--held_out", "0")
    assert "3 pairs, 2 with a caption; left out: 1 images that cannot be used, the first '01'" in said
    pairs = read(tmp_path / "out")
    assert [(key, pair["png"], pair.get("txt")) for key, pair in pairs.items()] == [
        ("0_0", images[0], b"first"), ("000000002", images[2], b"third"), ("000000003", images[3], None)
    ]  # fmt: skip
    metas = [json.loads(pair["json"]) for pair in pairs.values()]
    assert metas[0] == {"key": "0_0", "caption": "first", "similarity": 0.5, "width": 8, "height": 8}
    assert metas[1]["a"] == [1] and metas[1]["label"] == 7


def test_clip_art(tmp_path):
    for name, colour in (("animals/frog", "green"), ("shapes/star", "yellow")):
        for kind in ("png", "svg"):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"png/{name}.png")
        (tmp_path / f"svg/{name}.svg").write_text("<svg/>")
    built("openclipart", tmp_path, "--out", tmp_path / "out", "--held_out", "0")
    index = index_for(f"{tmp_path}/out/*.tar", tmp_path / "cache")
    assert [index.key(0, row) for row in range(len(index))] == ["animals/frog", "shapes/star"]


MISTAKES = {
    "no source": (["folder"], "folder needs a source"),
    "missing folder": (["folder", "{tmp}/nowhere"], "nowhere' is not a folder"),
    "empty folder": (["folder", "{tmp}/empty"], "no images"),
    "missing parquet": (["parquet", "{tmp}/nowhere.parquet"], "nowhere.parquet' is not a Parquet file"),
    "damaged parquet": (["parquet", "{tmp}/bad.parquet"], "bad.parquet' cannot be read"),
    "no images": (["parquet", "{tmp}/text.parquet"], "has no image column: name one jpg"),
    "no packages": (["openclipart", "{tmp}"], "apt install openclipart-png openclipart-svg"),
    "unknown kind": (["zip", "x"], "kind"),
    "share": (["folder", "x", "--held_out", "1"], "--held_out"),
    "size": (["folder", "x", "--image_size", "0"], "--image_size"),
    "unknown flag": (["folder", "x", "--heldout", "1"], "heldout"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    parquet_of(tmp_path / "text.parquet", text=["a"])
    arguments, names = MISTAKES[case]
    done = build(*(argument.format(tmp=tmp_path) for argument in arguments), "--out", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and names in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_shards_of_another_build_are_not_mixed_in(photos, tmp_path):
    (tmp_path / "train-00007.tar").write_text("")
    done = build("folder", photos, "--out", tmp_path)
    assert done.returncode == 2 and "not empty" in done.stderr and len(done.stderr.splitlines()) == 1


def odd_folder(folder: Path) -> Path:
    """Three good pairs, and what people's folders hold besides."""
    image = encode(Image.new("RGB", (8, 8)))
    folder.mkdir()
    for name in ("a.png", "a.jpg", "b.v1.png", "b_v1.png"):
        (folder / name).write_bytes(image)
    for name in ("a.txt", "b.v1.txt", "b_v1.caption.txt", "c.TXT"):
        (folder / name).write_text(name)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(image)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_bytes("caf\u00e9".encode("utf-16"))
    (folder / "c.png").write_bytes(image)
    (folder / "latin.png").write_bytes(image)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    return folder


def test_odd_names_links_and_keys_that_come_twice_lose_nothing(tmp_path):
    folder = odd_folder(tmp_path / "in")
    said = built("folder", folder, "--out", tmp_path / "out", "--held_out", "0")
    pairs = {key: pair["txt"].decode() for key, pair in read(tmp_path / "out").items()}
    assert pairs == {
        "a": "a.txt", "a_2": "a.txt", "b_v1": "b.v1.txt", "b_v1_2": "b_v1.caption.txt", "c": "c.TXT",
        "caf\\xe9": "caf\u00e9", "latin": "caf\ufffd",
    }  # fmt: skip
    assert f"'{folder}/a.png' has key 'a_2'" in said
    assert "1 captions are not UTF-8 and lost letters, the first of 'latin'" in said
    assert f"left out: 1 links to nothing, the first '{folder}/lost.png'" in said


def test_an_extension_of_captions_is_named(tmp_path):
    said = built("folder", odd_folder(tmp_path / "in"), "--out", tmp_path / "out", "--caption", "v1.txt")
    assert {key: pair["txt"] for key, pair in read(tmp_path / "out").items() if "txt" in pair} == {}
    assert "warning: none of 7 pairs have a caption: name the column or extension by --caption" in said


ODD_COLUMNS = {
    "nan": [float("nan")] * 3,
    "int": [1, 2, 3],
    "bool": [True, False, None],
    "list": [["a dog", "the dog"], [], None],
    "struct": [{"raw": "a dog", "id": 1}, None, {"raw": None, "id": 2}],
    "bytes": pyarrow.array([b"\xef\xbb\xbfa dog", b"caf\xe9", None]),
    "dictionary": pyarrow.array(["a dog", "a cat", None]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", ODD_COLUMNS)
def test_parquet_captions_of_any_type(tmp_path, kind):
    images = [encode(Image.new("RGB", (8 + i, 8))) for i in range(3)]
    columns = {"jpg": images, "caption": ODD_COLUMNS[kind], "key": ["/d/k.1", "k", "k"]}
    columns["json"] = [{"label": "x", "b": b"bytes"}, None, {"label": "y", "b": None}]
    path = parquet_of(tmp_path / "in.parquet", **columns)
    pairs = {pair.key: pair for pair in parquet_pairs(path, None, lambda key: True)}
    assert list(pairs) == ["d/k_1", "k", "k_2"]
    first = {"nan": "", "int": "", "bool": ""}.get(kind, "a dog")
    second = {"bytes": "caf\ufffd", "dictionary": "a cat"}.get(kind, "")
    assert [pair.caption for pair in pairs.values()] == [first, second, ""]
    assert pairs["d/k_1"].meta.get("captions") == ({"en": ["a dog", "the dog"]} if kind == "list" else None)
    assert [pair.meta.get("label") for pair in pairs.values()] == ["x", None, "y"]
    assert all(json.loads(pair.json)["key"] == key for key, pair in pairs.items())


def test_text_that_is_not_utf8_costs_only_its_letters(tmp_path):
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, [*pyarrow.array([b"caf\xe9", b"dog"]).buffers()])
    dates = pyarrow.array([2**62, 1], pyarrow.timestamp("us"))  # beyond Python's
    path = parquet_of(tmp_path / "in.parquet", jpg=[b"x", b"y"], caption=bad, other=bad, at=dates)
    pairs = list(parquet_pairs(path, None, lambda key: True))
    assert [pair.caption for pair in pairs] == ["caf\ufffd", "dog"]
    assert [pair.meta["other"] for pair in pairs] == ["caf\ufffd", "dog"]


def test_few_captions_are_reported_with_the_columns(tmp_path):
    images = [encode(Image.new("RGB", (8 + i, 8))) for i in range(3)]
    path = parquet_of(tmp_path / "in.parquet", jpg=images, caption=[1.0, float("nan"), 2.0], blurb=["a", "b", "c"])
    said = built("parquet", path, "--out", tmp_path / "out", "--held_out", "0")
    columns = "columns jpg (binary), caption (double), blurb (string)"
    assert f"none of 3 pairs have a caption: name the column or extension by --caption, one of {columns}" in said
    built("parquet", path, "--out", tmp_path / "named", "--held_out", "0", "--caption", "blurb")
    assert [pair["txt"] for pair in read(tmp_path / "named").values()] == [b"a", b"b", b"c"]
    done = build("parquet", path, "--out", tmp_path / "none", "--caption", "title")
    assert done.returncode == 2 and "in.parquet' has no text in a column 'title'" in done.stderr


def test_a_column_of_captions_that_has_another_use(tmp_path):
    images = [encode(Image.new("RGB", (8 + i, 8))) for i in range(2)] + [b""]
    path = parquet_of(tmp_path / "in.parquet", jpg=images, key=["an owl", "a dog", "a cat"])
    said = built("parquet", path, "--out", tmp_path / "keys", "--held_out", "0", "--caption", "key")
    assert {key: pair["txt"] for key, pair in read(tmp_path / "keys").items()} == {
        "an owl": b"an owl", "a dog": b"a dog"
    }  # fmt: skip
    assert "left out: 1 images that cannot be used, the first 'a cat': it has no bytes" in said
    done = build("parquet", path, "--out", tmp_path / "none", "--caption", "jpg")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "in.parquet' has images in the column 'jpg', which data.caption names; it has columns jpg" in done.stderr


def test_splits_of_multi30k_have_their_names(tmp_path):
    source = tmp_path / "multi30k"
    for folder in ("images", "image_splits", "raw"):
        (source / folder).mkdir(parents=True)
    for i, split in enumerate(("train", "test_2016_flickr")):
        (source / "images" / f"{i}.png").write_bytes(encode(Image.new("RGB", (8 + i, 8))))
        (source / "image_splits" / f"{split}.txt").write_text(f"{i}.png\n")
        for language, text in (("en", "a square"), ("de", "ein Quadrat")):
            (source / "raw" / f"{split}.{language}").write_text(f"{text} {i}\n")
    assert built("multi30k", source, "--out", tmp_path / "out").splitlines()[-1] == "2 pairs, 2 with a caption"
    for i, split in enumerate(("train", "test_2016_flickr")):
        ((key, files),) = read(tmp_path / "out", split).items()
        assert key == f"{split}/00001_{i}" and files["txt"] == f"a square {i}".encode()
        assert json.loads(files["json"])["captions"] == {"en": [f"a square {i}"], "de": [f"ein Quadrat {i}"]}


def test_tatoeba_is_for_evaluation(tmp_path):
    for side, text in (("deu", "Ja."), ("eng", "Yes.")):
        (tmp_path / f"tatoeba.deu-eng.{side}").write_text(f"{text}\n")
    built("tatoeba", tmp_path, "--out", tmp_path / "out", "--format", "parquet")
    (path,) = (tmp_path / "out").glob("*.parquet")
    (row,) = pyarrow.parquet.read_table(path).to_pylist()
    assert path.name == "held_out-00000.parquet"
    assert json.loads(row["json"])["captions"] == {"en": "Yes.", "de": "Ja."}


def test_questions_and_the_list_of_their_answers(tmp_path):
    built("scene-questions", "--out", tmp_path / "out", "--limit", "12")
    train, held_out = read(tmp_path / "out"), read(tmp_path / "out", "held_out")
    assert len(train) == len(held_out) == 12
    assert all(key.startswith("train/") for key in train) and all(key.startswith("held_out/") for key in held_out)
    labels = sorted({json.loads(pair["json"])["label"] for pair in train.values()})
    assert (tmp_path / "out" / "labels.txt").read_text().splitlines() == labels
