"""The formats that an encoder is exported to: how each is written, and how its own library reads it back.

Dimension letters: B batch, N patches, D width, S image side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mug.model import interchange
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.keyed_random import random_masking
from mug.model.objectives.objective import Objective, name_of
from mug.model.pixel_decoder import PixelDecoder
from mug.model.presets import EncoderConfig, PixelDecoderConfig
from mug.model.vit import NORM_EPS
from mug.run.common.errors import RunError
from mug.run.common.packages import load_package

EXTRA = "export"
WEIGHTS = "model.safetensors"
ONNX_BYTES = 1_900_000_000  # a protobuf file ends at 2 GB: larger weights go into a file next to it
OPSET = 18
# How the model cards open an image: as in training.
OPEN_IMAGE = """image = ImageOps.exif_transpose(Image.open("photo.png"))  # upright
if image.mode.startswith("I;16"):
    image = image.point(lambda level: level / 256).convert("L")  # Pillow would clip 16-bit grey
image = image.convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")  # on white
"""


@dataclass(frozen=True)
class Format:
    """One export format.

    write: writes (model, folder). read_back: (folder, model, uint8 images [B, 3, S, S]) → the library's output and
    ours, which must agree. packages: what writing and reading need beyond the install. usage: code of the model
    card, to be run inside the folder. shown: (that code's variables, model, uint8 view [1, 3, S, S] of its photo) →
    what it made of the photo and what we make of it, which must agree. versions: of the library, that can read it.
    """

    library: str
    versions: str
    packages: tuple[str, ...]
    write: Callable[[Objective, Path], None]
    read_back: Callable[[Path, Objective, Tensor], tuple[Tensor, Tensor]]
    usage: Callable[[Any], str]
    shown: Callable[[dict[str, Any], Objective, Tensor], tuple[Tensor, Tensor]]


# --- timm --------------------------------------------------------------------------------------------------


def architecture(config: EncoderConfig) -> str:
    """Returns the name of the timm model that takes our weights, given `timm_arguments`."""
    import timm  # takes seconds

    name = f"vit_{config.preset}_patch{config.patch_size}_{config.image_size}"
    return name if name in timm.list_models() else "vit_base_patch16_224"


def timm_arguments(config: EncoderConfig) -> dict[str, int]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }


def _timm_model(model: Objective) -> nn.Module:
    """Returns timm's model with our encoder's weights, and the description of its preprocessing."""
    import timm

    config, side = model.config, model.config.image_size
    described = {
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    arguments = timm_arguments(config)
    vit = timm.create_model(architecture(config), num_classes=0, pretrained_cfg=described, **arguments).eval()
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = model.encoder.norm.eps
    vit.load_state_dict(interchange.to_timm(model.encoder))
    return vit


def write_timm(model: Objective, folder: Path) -> None:
    """Write model.safetensors, and config.json as timm's `local-dir:` and `hf-hub:` names read it.

    Raises:
        RunError: layer norms with another epsilon than timm's, which its config.json cannot hold.
    """
    import timm

    if (eps := model.encoder.norm.eps) != NORM_EPS:
        raise RunError(f"timm: its ViT has layer norms with eps {NORM_EPS}, not {eps}; choose another --format")
    arguments = timm_arguments(model.config)
    timm.models.save_for_hf(_timm_model(model), folder, model_args=arguments, safe_serialization=True)
    _share_weights(folder)


def read_timm(folder: Path, model: Objective, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    import timm

    arguments = timm_arguments(model.config)
    path = str(folder / WEIGHTS)
    loaded = timm.create_model(architecture(model.config), num_classes=0, checkpoint_path=path, **arguments).eval()
    return loaded.forward_features(normalized(image_BCHW)), model.encoder(image_BCHW)


def timm_usage(config: EncoderConfig) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in timm_arguments(config).items())
    return f"""
import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()  # on the hub: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{OPEN_IMAGE}batch = transform(image)[None]
with torch.inference_mode():
    tokens = model.forward_features(batch)  # [1, {1 + config.patches}, {config.width}]: class token, patches
    feature = model(batch)  # [1, {config.width}], the class token

# Or by architecture, where the preprocessing is yours to set:
weights = timm.create_model(
    "{architecture(config)}", checkpoint_path="{WEIGHTS}", num_classes=0, {arguments}
)
"""


# --- transformers ------------------------------------------------------------------------------------------


def write_vit(model: Objective, folder: Path) -> None:
    """Write a ViTModel. Its pooler is the identity: `pooler_output` is the class token, and no weight is missing.

    transformers before 4.49 do not know `pooler_act`: their `pooler_output` is the token's tanh.
    """
    width = model.config.width
    pooler = {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    state = interchange.to_vit(interchange.to_timm(model.encoder)) | pooler
    _save_pretrained("ViTModel", model, state, folder, pooler_act="linear")


def read_vit(folder: Path, model: Objective, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    loaded = _from_pretrained("ViTModel", folder)
    return loaded(normalized(image_BCHW)).last_hidden_state, model.encoder(image_BCHW)


def vit_usage(config: EncoderConfig) -> str:
    return f"""
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(".").eval()  # on the hub: "OWNER/NAME"
processor = AutoImageProcessor.from_pretrained(".")
{OPEN_IMAGE}inputs = processor(image, return_tensors="pt")
with torch.inference_mode():
    tokens = model(**inputs).last_hidden_state  # [1, {1 + config.patches}, {config.width}]: class token, patches
feature = tokens[:, 0]  # [1, {config.width}], the class token
"""


def write_vitmae(model: Objective, folder: Path) -> None:
    """Write a ViTMAEForPreTraining: encoder and pixel decoder.

    Raises:
        RunError: the objective has no pixel decoder of MAE's kind, or did not train it.
    """
    config = model.config
    if "pixels" in model.losses and "pixels" not in model.active:
        raise RunError("vitmae: the pixel decoder was not trained (loss_weights.pixels is 0); choose another --format")
    if not isinstance(getattr(model, "pixel_decoder", None), PixelDecoder):
        raise RunError(f"vitmae: objective {name_of(type(model))} has no pixel decoder; choose another --format")
    _save_pretrained(
        "ViTMAEForPreTraining",
        model,
        interchange.to_vitmae(interchange.to_mae(model)),
        folder,
        decoder_hidden_size=config.pixel_width,
        decoder_num_hidden_layers=config.pixel_depth,
        decoder_num_attention_heads=config.pixel_heads,
        decoder_intermediate_size=4 * config.pixel_width,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.normalize_patches,
    )


def read_vitmae(folder: Path, model: Objective, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the predictions of the masked patches, and at the end the loss, of our masks."""
    config = model.config
    loaded = _from_pretrained("ViTMAEForPreTraining", folder)
    visible_BK, masked_BM = random_masking(0, torch.arange(len(image_BCHW)), config.patches, config.visible)
    noise_BN = torch.ones(len(image_BCHW), config.patches).scatter_(1, visible_BK, 0.0)
    output = loaded(normalized(image_BCHW), noise=noise_BN)
    index = masked_BM[..., None].expand(-1, -1, config.patch_values)
    encoded_BLD = model.encoder(image_BCHW, visible_BK)
    ours_BMP = model.pixel_decoder(encoded_BLD, visible_BK, masked_BM)
    loss = model.pixel_decoder.loss(image_BCHW, encoded_BLD, visible_BK, masked_BM)
    theirs = torch.cat([output.logits.gather(1, index).flatten(), output.loss.view(1)])
    return theirs, torch.cat([ours_BMP.flatten(), loss.view(1)])


def vitmae_usage(config: PixelDecoderConfig) -> str:
    return f"""
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained(".").eval()  # on the hub: "OWNER/NAME"
processor = AutoImageProcessor.from_pretrained(".")
{OPEN_IMAGE}inputs = processor(image, return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs)
predicted = output.logits  # [1, {config.patches}, {config.patch_values}]: every patch, values as (row, column, channel)
loss = output.loss  # over the masked patches
"""


def write_processor(config: EncoderConfig, folder: Path) -> None:
    """Write preprocessor_config.json: our central square, shorter side to S, bicubic, ImageNet's mean and deviation.

    BitImageProcessor takes a shorter side in transformers 4 and 5, as DINOv2 has it; ViT's only in 5.
    """
    side = config.image_size
    processor = load_package("transformers", EXTRA).BitImageProcessor(
        size={"shortest_edge": side},
        resample=Image.Resampling.BICUBIC,
        crop_size={"height": side, "width": side},
        image_mean=PIXEL_MEAN,
        image_std=PIXEL_STD,
        do_convert_rgb=True,
    )
    processor.save_pretrained(folder)


def _save_pretrained(name: str, model: Objective, state: interchange.State, folder: Path, **options: object) -> None:
    """Write transformers' model of this name with `state`, and its image processor."""
    config, kind = model.config, getattr(load_package("transformers", EXTRA), name)
    described = kind.config_class(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        layer_norm_eps=model.encoder.norm.eps,
        **options,
    )
    kind.from_pretrained(None, config=described, state_dict=state).save_pretrained(folder)
    _share_weights(folder)
    write_processor(config, folder)


def _from_pretrained(name: str, folder: Path) -> nn.Module:
    """Returns transformers' model of this folder, all of whose weights, and no others, are in the file."""
    transformers = load_package("transformers", EXTRA)
    loaded, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    strange = {kind: names for kind, names in report.items() if names}
    if strange:
        raise RuntimeError(f"{name} does not take the weights in {folder}: {strange}")
    return loaded.eval()


# --- ONNX --------------------------------------------------------------------------------------------------


class _Tokens(nn.Module):
    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vit.forward_features(pixel_values)


def write_onnx(model: Objective, folder: Path) -> None:
    """Write model.onnx: fp32 `pixel_values` [batch, 3, S, S], normalised, to `last_hidden_state` [batch, 1 + N, D]."""
    load_package("onnxscript", EXTRA)
    config, vit = model.config, _timm_model(model)
    program = torch.onnx.export(
        _Tokens(vit).eval(),
        (torch.zeros(2, 3, config.image_size, config.image_size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixel_values"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with this machine's paths
    size = sum(value.numel() * value.element_size() for value in vit.state_dict().values())
    program.save(folder / "model.onnx", external_data=size > ONNX_BYTES)
    write_processor(config, folder)


def read_onnx(folder: Path, model: Objective, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    runtime = load_package("onnxruntime", EXTRA)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (tokens,) = session.run(None, {"pixel_values": normalized(image_BCHW).numpy()})
    return torch.from_numpy(tokens), model.encoder(image_BCHW)


def onnx_usage(config: EncoderConfig) -> str:
    mean, std = list(PIXEL_MEAN), list(PIXEL_STD)
    return f"""
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
size = ({config.image_size}, {config.image_size})
{OPEN_IMAGE}image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
pixels = (np.asarray(image, np.float32) / 255 - {mean}) / {std}
batch = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # any number of images
(tokens,) = session.run(None, {{"pixel_values": batch}})
feature = tokens[:, 0]  # [1, {config.width}], the class token; the patches follow it
"""


# --- all ---------------------------------------------------------------------------------------------------


def shown_tokens(names: dict[str, Any], model: Objective, view_1CHW: Tensor) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(names["tokens"]), model.encoder(view_1CHW)


def shown_pixels(names: dict[str, Any], model: Objective, view_1CHW: Tensor) -> tuple[Tensor, Tensor]:
    """Makes a model that draws its own masks use those given."""
    return names["inputs"]["pixel_values"], normalized(view_1CHW)


TRANSFORMERS = "transformers 4.40 or later, 5 included"
FORMATS = {
    "timm": Format("timm", "timm 1.0.16 or later", (), write_timm, read_timm, timm_usage, shown_tokens),
    "transformers": Format(
        "transformers", TRANSFORMERS, ("transformers",), write_vit, read_vit, vit_usage, shown_tokens
    ),
    "vitmae": Format(
        "transformers", TRANSFORMERS, ("transformers",), write_vitmae, read_vitmae, vitmae_usage, shown_pixels
    ),
    "onnx": Format(
        "onnx",
        f"ONNX Runtime that knows opset {OPSET}",
        ("onnxruntime", "onnx", "onnxscript", "transformers"),
        write_onnx,
        read_onnx,
        onnx_usage,
        shown_tokens,
    ),
}


def normalized(image_BCHW: Tensor) -> Tensor:
    """Returns uint8 [B, 3, S, S] as the other libraries take it: fp32, less the mean, over the deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (image_BCHW / 255 - mean) / std


def _share_weights(folder: Path) -> None:
    """Give the weights the other files' permissions: safetensors makes them readable for their owner only."""
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)
