"""mug.api: what a model makes of images in every form, against the model itself and run/generate.py; and lists as
shards."""

import json

import numpy as np
import pytest
import torch
from evaluation import make_checkpoint
from PIL import Image

from mug.api import Model, load, read_pairs
from mug.api.images import image_bytes
from mug.api.pairs import write_pairs
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample, DataError
from mug.data.tokenizer import Tokenizer
from mug.model.objectives.classify import Classify, ClassifyConfig
from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.objectives.objective import Context, ObjectiveError
from mug.model.presets import resolve
from mug.run import export, generate
from mug.run.common.errors import RunError
from mug.run.state.restore import find
from mug.run.training.recipe import vocabulary_of

SIDE = 16  # of the checkpoint's images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, and its model."""
    folder = tmp_path_factory.mktemp("api") / "run"
    return folder, make_checkpoint(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of which no two, and no two halves, are alike."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (20 + 5 * number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def squares_BCHW(photos):
    return torch.from_numpy(np.stack([decode_crop(path.read_bytes(), SIDE, CentralSquare()) for path in photos]))


# --- Images -------------------------------------------------------------------------------------------------


def test_paths_pil_images_and_arrays_are_the_same(run, photos):
    model = load(run[0])
    features = [model.embed(form) for form in (photos, [*map(str, photos)], [*map(Image.open, photos)])]
    features.append(model.embed([np.asarray(Image.open(path)) for path in photos]))
    for other in features[1:]:
        assert torch.equal(other, features[0])


def test_a_pil_image_is_turned_upright(photos):
    image = Image.open(photos[0])
    image.getexif()[0x0112] = 6  # a quarter turn
    upright = decode_crop(image_bytes(image), SIDE, CentralSquare())
    turned = decode_crop(
        image_bytes(Image.open(photos[0]).transpose(Image.Transpose.ROTATE_270)), SIDE, CentralSquare()
    )
    assert np.array_equal(upright, turned)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_of_pil_is_read(mode):
    ramp_HW = np.tile(np.arange(SIDE, dtype=np.uint8) * 16, (SIDE, 1))
    if mode == "I;16":
        image = Image.fromarray(ramp_HW.astype(np.uint16) * 256)
    else:
        grey = Image.fromarray(ramp_HW)
        image = (grey if mode == "P" else grey.convert("RGB")).convert(mode)
    assert image.mode == mode
    seen_CHW = decode_crop(image_bytes(image), SIDE, CentralSquare())
    assert np.abs(seen_CHW.astype(int) - ramp_HW).max() <= 2


@pytest.mark.parametrize(
    ("image", "names"),
    [
        ("no.png", "cannot be read: No such file"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]: give uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \[3, 4, 5\]: give uint8"),
        (Image.new("F", (4, 4)), "mode F"),
        (7, "a int: give a path"),
        ("a\0b.png", "cannot be read: embedded null byte"),
    ],
)
def test_what_is_no_image_is_one_line(image, names):
    with pytest.raises(BadSample, match=names):
        image_bytes(image)


# --- Models -------------------------------------------------------------------------------------------------


def test_an_embedding_is_the_encoders_class_token(run, photos, squares_BCHW, monkeypatch):
    monkeypatch.setattr("mug.api.models.BATCH", 2)  # a full batch and a rest
    with torch.inference_mode():
        expected_BD = run[1].encoder(squares_BCHW)[:, 0]
    embedding_BD = load(run[0]).embed(photos)
    torch.testing.assert_close(embedding_BD, expected_BD)
    assert embedding_BD.dtype == torch.float32 and load(run[0]).embed([]).shape == (0, 16)


def test_captions_and_reconstructions_are_those_of_generate(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("mug.api.models.BATCH", 2)
    seen = {}
    monkeypatch.setattr(generate, "draw_grid", lambda pictures, path: seen.update(rows=pictures))
    arguments = [str(run[0]), *map(str, photos), "--beams", "3", "--out", str(tmp_path)]
    parsed = generate.parse(arguments)
    monkeypatch.setattr(generate, "parse", lambda: parsed)
    generate.main(Lines())
    model = load(run[0])
    assert model.caption(photos) == [row.captions["written"] for row in seen["rows"]]
    assert model.caption(photos, beams=3) == [row.captions["written, 3 beams"] for row in seen["rows"]]
    assert any(model.caption(photos)), "the captions say nothing"
    for (masked, painted), row in zip(model.reconstruct(photos), seen["rows"], strict=True):
        for ours, theirs in ((masked, row.images["masked"]), (painted, row.images["reconstruction"])):
            assert np.array_equal(np.asarray(ours), theirs.permute(1, 2, 0).numpy())


class Lines(list):
    """A console that keeps its lines."""

    rank = 0
    info = warn = list.append


@pytest.fixture
def clip(run):
    tokenizer = Tokenizer.load(find(run[0], print).folder / "tokenizer.json")
    sizes = {"image_size": SIDE, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "embedding_width": 8}
    sizes |= {"text_width": 16, "text_heads": 2, "text_length": 8, "text_layers": 1}
    torch.manual_seed(0)
    objective = CLIP(resolve(CLIPConfig(**sizes)), Context(vocabulary=vocabulary_of(tokenizer))).eval()
    return Model(objective.encoder, SIDE, objective, tokenizer)


def test_similarity_is_the_cosine_of_both_embeddings(clip, photos, squares_BCHW):
    texts = ["red square", "blue"]
    tokens_CT = torch.from_numpy(np.stack([clip.tokenizer.encode(text, 8) for text in texts]))
    with torch.inference_mode():
        image_BE, text_CE = clip.objective.embed_image(squares_BCHW), clip.objective.embed_text(tokens_CT)
    expected_BC = torch.nn.functional.cosine_similarity(image_BE[:, None], text_CE[None], dim=-1)
    torch.testing.assert_close(clip.similarity(photos, texts), expected_BC)


def test_what_a_model_lacks_is_one_line(run, clip, photos, tmp_path):
    with pytest.raises(RunError, match=r"^objective mug cannot embed captions; load a run of another objective$"):
        load(run[0]).similarity(photos, ["red"])
    with pytest.raises(RunError, match=r"^objective clip cannot write captions; "):
        clip.caption(photos)
    with pytest.raises(RunError, match=r"^objective clip cannot reconstruct images; "):
        clip.reconstruct(photos)
    make_checkpoint(tmp_path / "pixels", "--loss_weights.caption", "0")
    with pytest.raises(ObjectiveError, match=r"never learned to write captions"):
        load(tmp_path / "pixels").caption(photos)


def test_mistakes_are_one_line(run, photos, tmp_path):
    model = load(run[0])
    with pytest.raises(DataError, match=rf"^{tmp_path}/no.png: cannot be read: No such file or directory$"):
        model.embed([photos[0], tmp_path / "no.png"])
    with pytest.raises(DataError, match=r"^image 1: an array of int64 \[2\]"):
        model.embed([photos[0], np.arange(2)])
    with pytest.raises(RunError, match=r"^give a list of images, not one$"):
        model.embed(photos[0])
    for shape in ((9, 9, 3), (9, 9)):  # whose rows are no images
        with pytest.raises(RunError, match=r"^give a list of images, not one$"):
            model.embed(np.zeros(shape, np.uint8))
    assert model.embed(np.zeros((2, 9, 9, 3), np.uint8)).shape == (2, 16)
    with pytest.raises(RunError, match=r"^beams must be at least 1, not 0$"):
        model.caption(photos, beams=0)
    with pytest.raises(RunError, match=r"does not hold a checkpoint"):
        load(tmp_path)


# --- Exports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm", "transformers", "vitmae"])
def test_an_export_embeds_as_its_run(run, photos, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    export.FORMATS[name].write(run[1], folder)
    model = load(folder)
    torch.testing.assert_close(model.embed(photos), load(run[0]).embed(photos), atol=1e-5, rtol=1e-5)
    with pytest.raises(RunError, match=r"^an export holds the encoder alone and cannot write captions; load the run"):
        model.caption(photos)


def test_the_epsilon_of_an_export_is_kept(run, photos, tmp_path):
    config = resolve(ClassifyConfig(image_size=SIDE, patch_size=8, width=16, depth=1, heads=2, norm_eps=0.1))
    model = Classify(config, Context(class_names=("a", "b"))).eval()
    export.FORMATS["transformers"].write(model, tmp_path)
    expected = Model(model.encoder, SIDE).embed(photos)
    torch.testing.assert_close(load(tmp_path).embed(photos), expected, atol=1e-5, rtol=1e-5)


def test_an_export_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16, "image_size": 16}))
    with pytest.raises(RunError, match=r"does not state the encoder's depth, heads, patch_size; "):
        load(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(RunError, match=r"is an ONNX export: ONNX Runtime runs it"):
        load(tmp_path)


# --- Pairs --------------------------------------------------------------------------------------------------


def pairs_of(photos, count):
    return [(photos[number % 3], f"photo {number % 3} of three") for number in range(count)]


def test_pairs_come_back_from_their_shards(photos, tmp_path):
    pairs = pairs_of(photos, 40)
    options = write_pairs(iter(pairs), tmp_path, 0.2)
    found = [pair for name in ("data.shards", "data.held_out") for pair in read_pairs(options[name], 100, SIDE)]
    assert sorted(caption for _, caption in found) == sorted(caption for _, caption in pairs)
    for image, caption in found:
        square_CHW = decode_crop(photos[int(caption.split()[1])].read_bytes(), SIDE, CentralSquare())
        assert np.array_equal(np.asarray(image), square_CHW.transpose(1, 2, 0))
    held_out = read_pairs(options["data.held_out"], 100, SIDE)
    assert 2 <= len(held_out) <= 16
    tokenizer = Tokenizer.load(options["data.tokenizer"])
    assert tokenizer.decode(tokenizer.encode("photo 2 of three", 8)[1:]) == "photo 2 of three"


def test_the_same_pairs_give_the_same_bytes_and_others_replace_them(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("mug.api.pairs.PER_SHARD", 10)
    write_pairs(pairs_of(photos, 40), tmp_path, 0.2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_pairs(pairs_of(photos, 40), tmp_path, 0.2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "data.held_out" not in write_pairs(pairs_of(photos, 5), tmp_path, 0)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["train-00000.tar"]


@pytest.mark.parametrize(
    ("pairs", "names"),
    [
        ([(np.zeros((9, 9, 3), np.uint8), "a"), ("no.png", "b")], "^pair 1, no.png: cannot be read: No such file"),
        ([(np.zeros((9, 9, 3), np.uint8), "")], "hold no word"),
        ([], "^of 0 pairs none is left to train on"),
        ([("a.png", None)], r'^pair 0 is a tuple of str, NoneType: give \(image, caption\), and "" for no caption$'),
        (["a.png"], r"^pair 0 is a str: give \(image, caption\)"),
        ([("a.png", "b", "c")], r"^pair 0 is a tuple of str, str, str: give"),
    ],
)
def test_pairs_that_cannot_be_used_are_one_line(tmp_path, pairs, names):
    with pytest.raises(DataError, match=names):
        write_pairs(pairs, tmp_path, 0)
