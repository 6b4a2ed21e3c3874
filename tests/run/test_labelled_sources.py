"""Labelled images from every kind of source, read as their writers wrote them; and what is wrong with some."""

import gzip
import json
import os
import pickle
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import run_script
from encoded import encode
from PIL import Image

from mug.data.errors import DataError
from mug.data.labelled_sources import Source, open_folder, open_splits
from mug.model.encoder import Encoder
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve
from mug.run.common.errors import RunError
from mug.run.evaluate import process_group
from mug.run.evaluators.features import (
    EncoderFeatures,
    PixelFeatures,
    cached_features,
    extract,
    fast_products,
    untrained_encoder,
)

ROOT = Path(__file__).parents[2]
RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
LABELS = ["cat", "dog", "cat", "emu", "dog", "emu"]


def write_folder(folder: Path) -> None:
    for number, label in enumerate(LABELS):
        path = folder / label / "deeper" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(PICTURES[number]))
    (folder / "cat" / "notes.txt").write_text("no image")


def write_saved_dataset(folder: Path, labels: list[int | None], names: list[str] | None = None) -> None:
    """As Hugging Face's Dataset.save_to_disk leaves one, in two files."""
    folder.mkdir(parents=True)
    images = [{"bytes": encode(picture), "path": None} for picture in PICTURES]
    table = pa.table({"picture": pa.array(images), "class": pa.array(labels)})
    files = [f"data-0000{part}-of-00002.arrow" for part in range(2)]
    for part, name in enumerate(files):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(3 * part, 3))
    kind = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"}
    features = {"picture": {"_type": "Image"}, "class": kind}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "f00"}
    (folder / "state.json").write_text(json.dumps(state))


def write_fashion_mnist(folder: Path, labels: np.ndarray, images: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (images, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        head = b"\0\0\x08\x03" + np.array([images, 28, 28], ">i4").tobytes()
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        head = b"\0\0\x08\x01" + np.array([len(labels)], ">i4").tobytes()
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels.astype(np.uint8).tobytes()))


def build_shards(*arguments: object) -> None:
    done = run_script("run/build_shards.py", *arguments)
    assert done.returncode == 0, done.stderr


def seen(source: Source) -> set[tuple[str, bytes]]:
    """The label and the pixels of each image, after a round through pickle as worker processes get it."""
    source = pickle.loads(pickle.dumps(source))
    return {(source.labels[i].split("/")[0], source.view(i, 12).tobytes()) for i in range(len(source))}


EXPECTED = {(label, picture.transpose(2, 0, 1).tobytes()) for label, picture in zip(LABELS, PICTURES, strict=True)}


def test_a_folder_per_class(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / split)
    splits = open_splits(str(tmp_path), None, "label", None)
    assert splits.names == ["cat", "dog", "emu"]
    assert seen(splits.train) == seen(splits.test) == EXPECTED
    assert [splits.names[number] for number in splits.train_labels] == splits.train.labels


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_shards(tmp_path, format):
    write_folder(tmp_path / "photos")
    build_shards("folder", tmp_path / "photos", "--out", tmp_path / "shards", "--held_out", 0, "--format", format)
    shards = f"{tmp_path}/shards/*.{format}"
    splits = open_splits(shards, shards, "label", str(tmp_path / "cache"))
    assert seen(splits.train) == EXPECTED
    with pytest.raises(DataError, match="its json has no 'colour'; give the label's key"):
        open_splits(shards, shards, "colour", str(tmp_path / "cache"))


def test_a_hugging_face_dataset_on_disk(tmp_path):
    names = ["cat", "dog", "emu"]
    write_saved_dataset(tmp_path / "train", [names.index(label) for label in LABELS], names)
    write_saved_dataset(tmp_path / "test", [names.index(label) for label in LABELS], names)
    splits = open_splits(str(tmp_path), None, "class", None)
    assert seen(splits.train) == EXPECTED


def test_fashion_mnist_and_its_shards_hold_the_same(tmp_path):
    write_fashion_mnist(tmp_path / "fashion", np.array([0, 9, 5, 1, 1, 3]))
    splits = open_splits(f"fashion-mnist:{tmp_path}/fashion", None, "label", None)
    assert splits.train.labels == ["T-shirt/top", "Ankle boot", "Sandal", "Trouser", "Trouser", "Dress"]
    build_shards("fashion-mnist", tmp_path / "fashion", "--out", tmp_path / "shards", "--limit", "4")
    patterns = [f"{tmp_path}/shards/{split}-*.tar" for split in ("train", "held_out")]
    shards = open_splits(*patterns, "label", str(tmp_path / "cache"))
    assert shards.train.labels == splits.train.labels[:4] and len(shards.test) == 4
    for number in range(4):
        assert np.array_equal(shards.train.view(number, 28), splits.train.view(number, 28))


def test_pairs_of_fashion_mnist_are_captioned_by_class(tmp_path):
    from mug.data.builders.fashion_mnist import fashion_mnist_pairs

    write_fashion_mnist(tmp_path, np.array([0, 9, 7, 1, 1, 3]))
    pairs = list(fashion_mnist_pairs(tmp_path, lambda key: key.startswith("t10k/")))
    assert [pair.key for pair in pairs][:2] == ["t10k/00000", "t10k/00001"] and len(pairs) == 6
    assert pairs[1].caption == "a photo of an ankle boot" and pairs[2].caption == "a photo of a sneaker"
    assert pairs[3].meta["captions"]["en"][2] == "a small grey picture of a pair of trousers"


# --- What is wrong ----------------------------------------------------------------------------------------


def refused(message: str, data: Path | str, label: str = "class", test: str | None = None) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        open_splits(str(data), test, label, None)
    assert "\n" not in str(caught.value)


def test_an_empty_class_folder_is_named(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / split)
    (tmp_path / "train" / "fox").mkdir()
    refused(f"class folder {tmp_path}/train/fox does not hold an image; fill it or remove it", tmp_path)


def test_no_classes_one_class_an_unknown_class_and_no_test_images(tmp_path):
    refused("give the test images, too (--test or --data.test)", tmp_path)
    for name in ("none/train", "none/test", "one/train/cat", "one/test/cat", "new/train", "new/test/fox"):
        (tmp_path / name).mkdir(parents=True)
    refused("does not hold class folders", tmp_path / "none")
    for place in ("one/train/cat/1.png", "one/test/cat/1.png", "new/test/fox/1.png"):
        (tmp_path / place).write_bytes(encode(PICTURES[0]))
    refused("all of one class (cat)", tmp_path / "one")
    write_folder(tmp_path / "new" / "train")
    refused("1.png: its label 'fox' is not one of the training images' 3 classes", tmp_path / "new")


def test_labels_out_of_range_are_named(tmp_path):
    for split in ("train", "test"):
        write_saved_dataset(tmp_path / split, [0, 1, 2, 3, 0, 1], ["cat", "dog", "emu"])
    refused("row 3: label 3 is out of range, the dataset names 3 classes", tmp_path)
    refused("has the columns picture, class", tmp_path, label="species")
    write_fashion_mnist(tmp_path / "fashion", np.array([0, 10, 5, 1, 1, 3]))
    refused("holds the label 10, out of range", f"fashion-mnist:{tmp_path}/fashion")
    write_fashion_mnist(tmp_path / "fashion", np.array([0, 1]))
    refused("holds 2 labels for 6 images", f"fashion-mnist:{tmp_path}/fashion")


def test_damaged_and_missing_files_are_named(tmp_path):
    write_fashion_mnist(tmp_path, np.array([0, 9, 5, 1, 1, 3]))
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-50])
    refused("train-images-idx3-ubyte.gz' cannot be read", f"fashion-mnist:{tmp_path}")
    images.unlink()
    refused("install Debian's dataset-fashion-mnist", f"fashion-mnist:{tmp_path}")
    (tmp_path / "a" / "cat").mkdir(parents=True)
    (tmp_path / "a" / "cat" / "1.png").write_bytes(encode(PICTURES[0])[:60])
    with pytest.raises(DataError, match=r"a/cat/1.png: PNG damaged"):
        open_folder(tmp_path / "a").view(0, 12)


@pytest.fixture
def one_rank():
    with patch.dict(os.environ), process_group():  # which puts its place into the environment
        yield


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line_from_a_worker_too(tmp_path, workers):
    write_folder(tmp_path)
    (tmp_path / "dog" / "broken.png").write_bytes(encode(PICTURES[0])[:60])
    with pytest.raises(DataError, match=r"dog/broken\.png: PNG damaged.*; fix or remove it") as refused:
        extract(PixelFeatures(), open_folder(tmp_path), 4, workers, "cpu")
    assert "\n" not in str(refused.value)
    (tmp_path / "dog" / "broken.png").unlink()
    source = open_folder(tmp_path)
    (tmp_path / "dog" / "deeper" / "4.png").unlink()
    with pytest.raises(DataError, match=r"4\.png: No such file or directory; fix or remove it"):
        extract(PixelFeatures(), source, 4, workers, "cpu")


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "dog" / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"dog/link\.png: No such file or directory; fix or remove it"):
        open_folder(tmp_path)


def test_features_stand_in_the_order_of_the_images(tmp_path):
    write_folder(tmp_path)
    source = open_folder(tmp_path)
    features = extract(PixelFeatures(), source, 4, 1, "cpu")["pixels"]
    expected = np.stack([source.view(i, PixelFeatures.size) for i in range(6)])
    assert np.array_equal((features * 255).round().numpy(), expected.reshape(6, -1))


def test_features_are_made_once_and_again_where_their_file_is_damaged(tmp_path, one_rank):
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"pixels": torch.arange(6.0)}

    for _ in range(2):
        assert torch.equal(cached_features(tmp_path / "features", "key", make)["pixels"], torch.arange(6.0))
    (kept,) = (tmp_path / "features").iterdir()
    assert len(made) == 1
    kept.write_bytes(kept.read_bytes()[:40])
    for _ in range(2):
        assert torch.equal(cached_features(tmp_path / "features", "key", make)["pixels"], torch.arange(6.0))
    assert len(made) == 2 and list((tmp_path / "features").iterdir()) == [kept]


def test_a_folder_that_cannot_keep_features_is_refused_before_they_are_made(one_rank):
    for folder in (Path("/proc/self"), Path("/proc/self/features")):  # no rights help to write there
        with pytest.raises(RunError, match=rf"cannot write features to {folder} \(.*\): choose another --cache"):
            cached_features(folder, "key", lambda: pytest.fail("made in vain"))


def test_encoders_of_the_same_weights_and_other_heads_have_other_features():
    sizes = {"image_size": 12, "patch_size": 4, "width": 16, "depth": 1}
    configs = {heads: resolve(MUGConfig(heads=heads, **sizes)) for heads in (2, 4)}
    vocabulary = Vocabulary(20, 0, 1, 2, 3)
    objectives = {heads: MUG(config, Context(vocabulary=vocabulary)) for heads, config in configs.items()}
    keys = {heads: EncoderFeatures(untrained_encoder(one, 0), 12).key() for heads, one in objectives.items()}
    assert keys[2] != keys[4]


def test_features_that_are_not_finite_are_refused(tmp_path):
    write_folder(tmp_path)
    encoder = Encoder(resolve(MUGConfig(image_size=12, patch_size=4, width=16, depth=1, heads=2)))
    torch.nn.init.constant_(encoder.norm.weight, torch.nan)
    with pytest.raises(RunError, match=r"class token of 6 of 6 images is not finite, .*\.png the first; the weights"):
        extract(EncoderFeatures(encoder, 12), open_folder(tmp_path), 4, 0, "cpu")


def test_a_folder_as_notebooks_and_desktops_leave_it(tmp_path, caplog):
    """Neither a class .ipynb_checkpoints nor copies of images; every format; linked folders; the rest is counted."""
    kinds = {"bmp": "BMP", "gif": "GIF", "TIF": "TIFF", "PNG": "PNG"}
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for suffix, kind in kinds.items():
            Image.fromarray(PICTURES[0]).convert("RGB").save(tmp_path / label / f"a.{suffix}", kind)
    for hidden in (tmp_path / ".ipynb_checkpoints", tmp_path / "cat" / ".ipynb_checkpoints"):
        hidden.mkdir()
        (hidden / "a-checkpoint.png").write_bytes(encode(PICTURES[0]))
    (tmp_path / "emu").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"x")
    source = open_folder(tmp_path)
    assert source.labels == ["cat"] * 4 + ["dog"] * 4 + ["emu"] * 4
    assert all(source.view(number, 12).shape == (3, 12, 12) for number in range(12))
    (line,) = caplog.messages
    assert "2 hidden folders" in line and "2 files that are not images by their names" in line and "Thumbs.db" in line


def test_products_are_fast_on_a_gpu_alone_and_as_before_afterwards():
    before = torch.get_float32_matmul_precision()
    with fast_products("cuda:0"):
        assert torch.get_float32_matmul_precision() == "high"
    with fast_products("cpu"):
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError), fast_products(torch.device("cuda")):
        raise ValueError
    assert torch.get_float32_matmul_precision() == before
