"""Exported folders as others load them: their code from the model card, run on a photo that is not square."""

import dataclasses
import json
import logging
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from noise import noisy
from PIL import Image

from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.model.objectives.classify import Classify, ClassifyConfig
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context, Objective
from mug.model.objectives.segment import Segment, SegmentConfig
from mug.model.presets import Vocabulary, resolve
from mug.run import export
from mug.run.common.errors import RunError
from mug.run.exporting.card import model_card
from mug.run.exporting.formats import FORMATS, normalized
from mug.run.state.checkpoint import Checkpoint

SIZES = MUGConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, pixel_width=16, pixel_depth=1, pixel_heads=2)
SIZES = dataclasses.replace(SIZES, text_width=16, text_heads=2, text_unimodal_layers=1, text_cross_layers=1)
CONTEXT = Context(vocabulary=Vocabulary(size=20, pad=0, bos=1, eos=2, mask=3))
ONE_LEVEL = 1.5 / 255 / 0.224  # of grey, normalised: resizers round differently
RECIPE = {"data": {"shards": None}, "seed": 0, "trainer": {"global_batch": 8}}
RECIPE |= {"loss_weights": {"pixels": 1.0, "caption": 0.1}}


@pytest.fixture(scope="module")
def model() -> MUG:
    torch.manual_seed(0)
    return noisy(MUG(resolve(SIZES), CONTEXT)).eval()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Checkpoint:
    """A checkpoint's folder and manifest, with the run's metrics next to it."""
    run = tmp_path_factory.mktemp("runs") / "my_run"
    (run / "checkpoint-20").mkdir(parents=True)
    rows = [
        {"kind": "eval", "step": 10, "loss/total": 9.0},
        {"kind": "eval", "step": 20, "loss/total": 1.25, "accuracy/caption": 0.5, "position": 160},
        {"kind": "train", "step": 20, "loss/total": 7.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"fingerprint": "f1" * 32, "next_position": 160}
    return Checkpoint(run / "checkpoint-20", {"step": 20, "recipe": RECIPE, "data": data})


@pytest.fixture(scope="module")
def folders(model, found, tmp_path_factory):
    """Function format → its exported folder."""
    out, made = tmp_path_factory.mktemp("out"), {}

    def folder(name: str):
        if name not in made:
            made[name] = export.export(name, FORMATS[name], model, found, out / name)
            assert made[name] < 1e-5
        return out / name

    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A smooth picture of 90 x 60 px, and what our encoder makes of its evaluation view."""
    y, x = np.mgrid[:60, :90]
    waves = [np.sin(x / 9 + y / 14), np.cos(x / 17), np.sin(y / 8)]
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray((127 + 120 * np.stack(waves, 2)).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def square(photo):
    """The photo's central square, of which all libraries show the same part."""
    path = photo.with_name("square.png")
    Image.open(photo).crop((15, 0, 75, 60)).save(path)
    return path


def view_of(photo) -> torch.Tensor:
    """uint8 [1, 3, 32, 32]."""
    return torch.from_numpy(decode_crop(photo.read_bytes(), 32, CentralSquare()))[None]


def run_card(folder, photo) -> dict:
    """The model card's code, run in the exported folder as the card says; returns its variables."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    return export.run_usage(code, folder, photo)


# Resizing differs: timm and Pillow cut the same pixels and round otherwise, transformers resizes before it cuts.
@pytest.mark.parametrize(("name", "bar"), [("timm", 0.02), ("transformers", 0.05), ("onnx", 0.02)])
@torch.inference_mode()
def test_the_cards_code_gives_our_features(model, folders, photo, name, bar):
    names = run_card(folders(name), photo)
    ours = model.encoder(view_of(photo))
    assert np.abs(np.asarray(names["tokens"]) - ours.numpy()).max() < bar
    assert np.abs(np.asarray(names["feature"]) - ours[:, 0].numpy()).max() < bar


@torch.inference_mode()
def test_the_cards_code_of_vitmae_runs(folders, photo):
    names = run_card(folders("vitmae"), photo)
    assert names["predicted"].shape == (1, 16, 192)
    assert 0 < names["loss"].item() < 100


@pytest.mark.parametrize("how", ["checkpoint_path", "local-dir"])
@torch.inference_mode()
def test_timm_loads_it_without_a_warning(model, folders, photo, how, recwarn, caplog):
    folder = folders("timm")
    with caplog.at_level(logging.WARNING):
        if how == "local-dir":
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        else:
            sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
            path = str(folder / "model.safetensors")
            loaded = timm.create_model("vit_base_patch16_224", checkpoint_path=path, num_classes=0, **sizes).eval()
    assert not caplog.records and not recwarn.list
    image = view_of(photo)
    assert (loaded.forward_features(normalized(image)) - model.encoder(image)).abs().max() < 1e-4


def test_timm_prepares_images_as_we_do(folders, square):
    loaded = timm.create_model(f"local-dir:{folders('timm')}", pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (3, 32, 32) and config["interpolation"] == "bicubic" and config["crop_pct"] == 1.0
    assert list(config["mean"]) == [0.485, 0.456, 0.406] and list(config["std"]) == [0.229, 0.224, 0.225]
    theirs = timm.data.create_transform(**config)(Image.open(square))
    assert (theirs - normalized(view_of(square))[0]).abs().max() < ONE_LEVEL


def test_transformers_prepares_images_as_we_do(folders, square):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folders("transformers"))
    theirs = processor(Image.open(square), return_tensors="pt")["pixel_values"][0]
    assert (theirs - normalized(view_of(square))[0]).abs().max() < ONE_LEVEL


def test_transformers_pooler_is_the_class_token_and_nothing_is_missing(folders):
    from transformers import AutoModel, ViTModel

    loaded, said = ViTModel.from_pretrained(folders("transformers"), output_loading_info=True)
    assert not any(said.values()), said
    assert type(AutoModel.from_pretrained(folders("transformers"))) is type(loaded)


def test_onnx_takes_any_batch_and_tells_no_paths(model, folders):
    import onnxruntime

    session = onnxruntime.InferenceSession(folders("onnx") / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        image = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(count))
        (tokens,) = session.run(["last_hidden_state"], {"pixel_values": normalized(image).numpy()})
        with torch.inference_mode():
            assert np.abs(tokens - model.encoder(image).numpy()).max() < 1e-4
    assert b".py" not in (folders("onnx") / "model.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_a_copy_of_every_preset_agrees(preset, name, found, tmp_path):
    text = {"text_width": 16, "text_heads": 2, "text_unimodal_layers": 1, "text_cross_layers": 1}  # is not exported
    torch.manual_seed(0)
    model = MUG(resolve(MUGConfig(preset, **text)), CONTEXT).eval()
    assert export.export(name, FORMATS[name], model, found, tmp_path / name) < 1e-4


def test_the_card_says_where_the_weights_come_from(folders):
    text = (folders("timm") / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "timm"
    assert header["license"] == ["apache-2.0", "cc-by-sa-4.0"]
    assert "# my_run\n" in text and "step 20" in text and "f1" * 32 in text
    assert "| loss/total | 1.2500 |" in text and "| accuracy/caption | 0.5000 |" in text
    line = "trained with the objective `mug`: MUG (arXiv 2301.07088): one encoder, a pixel decoder and a text decoder"
    assert line in text and "Losses: pixels (weight 1), caption (weight 0.1)." in text
    assert "9.0" not in text and "7.0" not in text, "metrics of another step or kind"
    assert re.search(r"commit `[0-9a-f]{40}`|commit unknown", text)
    assert "global_batch: 8" in text and "designed by OpenMoji" in text


def test_a_metric_that_was_not_finite_is_left_out_of_the_card(model, tmp_path):
    row = {"kind": "eval", "step": 20, "loss/total": None, "accuracy/caption": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    found = Checkpoint(tmp_path / "checkpoint-20", {"step": 20, "recipe": RECIPE, "data": {"fingerprint": "f1"}})
    card = model_card("run", FORMATS["timm"], model, found)
    assert "| accuracy/caption | 0.5000 |" in card and "loss/total" not in card


def test_of_captions_alone_no_pixel_decoder_is_handed_over(model, found, tmp_path):
    recipe = {**RECIPE, "loss_weights": {"pixels": 0.0, "caption": 0.1}}
    alone = Checkpoint(found.folder, {**found.manifest, "recipe": recipe})
    trained = MUG(model.config, dataclasses.replace(CONTEXT, losses=("caption",))).eval()
    card = model_card("run", FORMATS["timm"], trained, alone)
    assert "Losses: caption (weight 0.1)." in card
    with pytest.raises(RunError, match="vitmae: the pixel decoder was not trained"):
        export.export("vitmae", FORMATS["vitmae"], trained, alone, tmp_path / "vitmae")


# --- Encoders of other objectives -----------------------------------------------------------------------------

TUNED = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "heads": 2}


def tuned(norm_eps: float = 1e-6) -> Classify:
    """A classifier whose every parameter matters, its positions among them."""
    torch.manual_seed(0)
    config = resolve(ClassifyConfig(**TUNED, norm_eps=norm_eps))
    return noisy(Classify(config, Context(class_names=("cat", "dog")))).eval()


def trained_on(model: Objective, found: Checkpoint, **data: object) -> Checkpoint:
    recipe = {**RECIPE, "loss_weights": dict(model.losses), "data": data}
    return Checkpoint(found.folder, {**found.manifest, "recipe": recipe})


@pytest.mark.parametrize("name", ["timm", "transformers", "onnx"])
def test_a_finetuned_encoder_is_handed_over_with_its_learned_positions(name, found, tmp_path):
    model = tuned()
    imagenet = trained_on(model, found, images="imagenet")
    assert export.export(name, FORMATS[name], model, imagenet, tmp_path / name) < 1e-4
    text = (tmp_path / name / "README.md").read_text()
    assert "trained with the objective `classify`: An encoder with a linear layer on top" in text
    assert "Losses: class (weight 1)." in text and "Positions are learned." in text
    assert "Data: imagenet" in text and "the licence is not recorded" in text
    assert "MUG" not in text


@pytest.mark.parametrize("name", ["transformers", "onnx"])
def test_the_epsilon_of_the_norms_goes_along(name, found, tmp_path):
    model = tuned(norm_eps=1e-2)  # so large that it shows
    assert export.export(name, FORMATS[name], model, trained_on(model, found, images="x"), tmp_path / name) < 1e-4


def test_what_a_format_cannot_hold_is_refused(found, tmp_path):
    model = tuned(norm_eps=1e-12)
    for name, says in (("timm", "eps 1e-06, not 1e-12"), ("vitmae", "objective classify has no pixel decoder")):
        with pytest.raises(RunError, match=f"{name}: .*{says}; choose another --format"):
            export.export(name, FORMATS[name], model, trained_on(model, found, images="x"), tmp_path / name)
    segment = Segment(resolve(SegmentConfig(**TUNED, channels=8)), Context(class_names=("a", "b")))
    with pytest.raises(RunError, match="does not hold a complete encoder: objective segment has no final norm"):
        export.export("timm", FORMATS["timm"], segment, trained_on(segment, found, folder="x"), tmp_path / "timm")
    assert not list(tmp_path.iterdir())


def test_the_streams_of_a_mixture_are_all_named(model, found):
    streams = {"web": {"config": {"shards": "web.tar"}, "weight": 2.0}}
    streams |= {"emoji": {"config": {"shards": None}, "weight": 1.0}}
    recipe = {**RECIPE, "data": streams}
    card = model_card("run", FORMATS["timm"], model, Checkpoint(found.folder, {**found.manifest, "recipe": recipe}))
    assert "web: web.tar\n\nemoji: the embedded OpenMoji set\n" in card and "the licence is not recorded" in card


# --- The command ----------------------------------------------------------------------------------------------


def test_a_format_that_is_named_twice_is_written_once(model, found, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export.py", "run", "--format", "timm", "timm", "--out", str(tmp_path)])
    monkeypatch.setattr(export, "restore", lambda *_: (model, None, found))
    said = []
    export.main(SimpleNamespace(info=said.append, warn=said.append))
    assert len(said) == 2 and (tmp_path / "timm" / "model.safetensors").is_file()


def test_the_licence_of_own_shards_is_left_to_their_owner(model, found, tmp_path):
    recipe = {**RECIPE, "data": {"shards": "cc3m/{00000..00331}.tar"}}
    own = Checkpoint(found.folder, {**found.manifest, "recipe": recipe})
    export.export("timm", FORMATS["timm"], model, own, tmp_path / "timm")
    text = (tmp_path / "timm" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "OpenMoji" not in text and "Data: cc3m/{00000..00331}.tar" in text and "the licence is not recorded" in text


def test_weights_that_are_not_finite_are_refused(model, found, tmp_path):
    broken = MUG(model.config, CONTEXT)
    broken.encoder.norm.weight.data[0] = torch.nan
    with pytest.raises(RunError, match=r"checkpoint-20: the model's output is not finite"):
        export.export("timm", FORMATS["timm"], broken, found, tmp_path / "timm")
    assert not list(tmp_path.iterdir()), "nothing half-written stays behind"


def test_a_copy_that_differs_is_not_handed_over(model, found, tmp_path, monkeypatch):
    from mug.model import interchange

    right = interchange.to_timm
    monkeypatch.setattr(interchange, "to_timm", lambda encoder: {**right(encoder), "cls_token": torch.ones(1, 1, 32)})
    with pytest.raises(RuntimeError, match="timm: the copy differs"):
        export.export("timm", FORMATS["timm"], model, found, tmp_path / "timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "package"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("transformers", "transformers")]
)
def test_a_missing_package_is_named_with_its_extra(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["export.py", "nowhere", "--format", name, "--out", str(tmp_path / "out")])
    with pytest.raises(RunError, match=rf"package {package} is not installed: pip install .*\[export\]"):
        export.main(console=None)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [(["x", "--format", "onx"], "onx"), (["x", "--frmat", "onnx"], "frmat"), ([], "checkpoint")],
    ids=["unknown format", "unknown flag", "no checkpoint"],
)
def test_a_mistake_on_the_command_line_is_named(arguments, names):
    with pytest.raises(RunError) as refused:
        export.parse(arguments)
    assert names in str(refused.value) and "\n" not in str(refused.value)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "file").write_text("")
    for folder, message in (("timm", "exists; remove it"), ("file/timm", "cannot write to")):
        with pytest.raises(RunError, match=message):
            export.check_target(tmp_path / folder)
