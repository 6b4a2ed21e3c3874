"""The model cards' code on photos as people have them, with the library that is installed and with older ones.

Other versions of transformers are tried where MUG_OTHER_TRANSFORMERS names folders that hold them, after

    pip install --target FOLDER 'transformers==4.40.2' 'huggingface-hub<1'
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from noise import noisy
from PIL import ExifTags, Image

from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve
from mug.run import export
from mug.run.exporting.formats import FORMATS, normalized
from mug.run.state.checkpoint import Checkpoint

SIDE = 32
SIZES = {"image_size": SIDE, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
SIZES |= {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "text_width": 16, "text_heads": 2}
SIZES |= {"text_unimodal_layers": 1, "text_cross_layers": 1}
CONTEXT = Context(vocabulary=Vocabulary(size=20, pad=0, bos=1, eos=2, mask=3))
OTHERS = [folder for folder in os.environ.get("MUG_OTHER_TRANSFORMERS", "").split(os.pathsep) if folder]


@pytest.fixture(scope="module")
def model() -> MUG:
    torch.manual_seed(0)
    return noisy(MUG(resolve(MUGConfig(**SIZES)), CONTEXT)).eval()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("out")
    recipe = {"data": {"shards": None}, "loss_weights": {"pixels": 1.0, "caption": 0.1}}
    found = Checkpoint(out / "run" / "checkpoint-20", {"step": 20, "recipe": recipe, "data": {"fingerprint": "f1"}})
    for name, form in FORMATS.items():
        export.export(name, form, model, found, out / name)
    return {name: out / name for name in FORMATS}


def pixels(channels: int) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    waves = [np.sin(x / 4 + y / 6), np.cos(x / 5), np.sin(y / 3), np.cos(x * y / 90)]
    return (127 + 120 * np.stack(waves[:channels], 2)).astype(np.uint8)


def palette() -> Image.Image:
    image = Image.fromarray(pixels(3)).quantize(16)
    image.info["transparency"] = 3
    return image


PHOTOS = {
    "RGBA": lambda: Image.fromarray(pixels(4)),
    "grey with alpha": lambda: Image.fromarray(pixels(2)),
    "palette": palette,
    "grey": lambda: Image.fromarray(pixels(1)[..., 0]),
    "16-bit grey": lambda: Image.fromarray(pixels(1)[..., 0].astype(np.uint16) * 257),
    "CMYK": lambda: Image.fromarray(pixels(4), "CMYK"),
    **{f"turned {i}": lambda: Image.fromarray(pixels(4)) for i in range(2, 9)},
}


def save(name: str, folder: Path) -> Path:
    """The photo of this name; of the model's size, so that nothing is resized."""
    image, exif = PHOTOS[name](), Image.Exif()
    if name.startswith("turned"):
        exif[ExifTags.Base.Orientation] = int(name[-1])
    path = folder / f"{name}.{'tif' if image.mode == 'CMYK' else 'png'}"
    image.save(path, exif=exif)
    return path


def card_code(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_the_cards_code_sees_photos_as_training_does(name, model, folders, tmp_path):
    code = card_code(folders[name])
    for kind in PHOTOS:
        photo = save(kind, tmp_path)
        view = torch.from_numpy(decode_crop(photo.read_bytes(), SIDE, CentralSquare()))[None]
        theirs, ours = FORMATS[name].shown(export.run_usage(code, folders[name], photo), model, view)
        assert (theirs - ours).abs().max() < 1e-4, kind


def test_the_card_names_the_versions(folders):
    import timm
    import transformers

    text = (folders["transformers"] / "README.md").read_text(encoding="utf-8")
    assert "With transformers 4.40 or later, 5 included; this code was run when the folder was written" in text
    assert f"with transformers {transformers.__version__}." in text
    assert f"with timm {timm.__version__}." in (folders["timm"] / "README.md").read_text(encoding="utf-8")


def test_a_card_whose_code_drops_the_alpha_is_not_handed_over(model, folders, tmp_path, monkeypatch):
    from mug.run.exporting import formats

    monkeypatch.setattr(formats, "OPEN_IMAGE", 'image = Image.open("photo.png").convert("RGB")\n')
    found = Checkpoint(
        tmp_path / "checkpoint-1", {"step": 1, "recipe": {"data": {"shards": None}, "loss_weights": dict(MUG.losses)}}
    )
    found.manifest["data"] = {"fingerprint": "f1"}
    with pytest.raises(RuntimeError, match="timm: the card's code differs from our model by"):
        export.export("timm", FORMATS["timm"], model, found, tmp_path / "timm")
    assert not (tmp_path / "timm").exists()


OTHER = """
import sys
import numpy as np
import transformers
from pathlib import Path
print(transformers.__version__, transformers.__file__)
photo, out, code = sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_text()
names = {}
exec(code.replace('"photo.png"', repr(photo)), names)
shown = names["tokens"] if "tokens" in names else names["inputs"]["pixel_values"]
np.save(out, np.asarray(shown))
"""


@pytest.mark.skipif(not OTHERS, reason="MUG_OTHER_TRANSFORMERS names no folder")
@pytest.mark.parametrize("name", ["transformers", "vitmae"])
@pytest.mark.parametrize("other", OTHERS)
@torch.inference_mode()
def test_other_versions_of_transformers_give_our_features(other, name, model, folders, tmp_path):
    photo = save("turned 6", tmp_path)
    (tmp_path / "card.py").write_text(card_code(folders[name]))
    (tmp_path / "run.py").write_text(OTHER)
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", photo, tmp_path / "shown.npy", tmp_path / "card.py"],
        cwd=folders[name],
        env={**os.environ, "PYTHONPATH": other},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert other in done.stdout, "the other version is what ran"
    view = torch.from_numpy(decode_crop(photo.read_bytes(), SIDE, CentralSquare()))[None]
    ours = normalized(view) if name == "vitmae" else model.encoder(view)
    assert np.abs(np.load(tmp_path / "shown.npy") - ours.numpy()).max() < 1e-4
    assert "not initialized" not in done.stderr and "newly initialized" not in done.stderr, done.stderr
