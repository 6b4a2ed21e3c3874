"""The formats that an encoder is handed over in: how each is written, and how its own library reads it back.

Dimension letters: B batch, N patches, D width, S image side.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mug.kernels.masked_patch_loss import masked_patch_loss
from mug.model import interchange
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.mug import MUG
from mug.model.presets import ModelConfig
from mug.run.training.errors import RunError
from mug.run.training.packages import load_package

EXTRA = "export"
WEIGHTS = "model.safetensors"
ONNX_BYTES = 1_900_000_000  # a protobuf file ends at 2 GB: larger weights lie beside it
OPSET = 18


@dataclass(frozen=True)
class Format:
    """One way to hand the model over.

    write: writes (model, folder). read_back: (folder, model, uint8 images [B, 3, S, S]) → the library's answer and
    ours, which must agree. packages: what writing and reading need beyond the install. usage: code of the model
    card, to be run inside the folder.
    """

    library: str
    packages: tuple[str, ...]
    write: Callable[[MUG, Path], None]
    read_back: Callable[[Path, MUG, Tensor], tuple[Tensor, Tensor]]
    usage: Callable[[ModelConfig], str]


# --- timm --------------------------------------------------------------------------------------------------


def architecture(config: ModelConfig) -> str:
    """The timm model of this name takes our weights, given `timm_arguments`."""
    name = f"vit_{config.preset}_patch{config.patch_size}_{config.image_size}"
    return name if name in timm.list_models() else "vit_base_patch16_224"


def timm_arguments(config: ModelConfig) -> dict[str, int]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }


def write_timm(model: MUG, folder: Path) -> None:
    """model.safetensors, and config.json as timm's `local-dir:` and `hf-hub:` names read it."""
    config, side = model.config, model.config.image_size
    _write_weights(folder, interchange.to_timm(model.encoder))
    pretrained = {
        "input_size": [3, side, side],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    described = {
        "architecture": architecture(config),
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "token",
        "model_args": timm_arguments(config),
        "pretrained_cfg": pretrained,
    }
    _write_json(folder / "config.json", described)


def read_timm(folder: Path, model: MUG, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    arguments = timm_arguments(model.config)
    path = str(folder / WEIGHTS)
    loaded = timm.create_model(architecture(model.config), num_classes=0, checkpoint_path=path, **arguments).eval()
    return loaded.forward_features(normalized(image_BCHW)), model.encoder(image_BCHW)


def timm_usage(config: ModelConfig) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in timm_arguments(config).items())
    return f"""
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # on the hub: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("photo.png").convert("RGB"))
with torch.inference_mode():
    tokens = model.forward_features(image[None])  # [1, {1 + config.patches}, {config.width}]: class token, patches
    feature = model(image[None])  # [1, {config.width}], the class token

# Or by architecture, where the preprocessing is yours to set:
weights = timm.create_model(
    "{architecture(config)}", checkpoint_path="{WEIGHTS}", num_classes=0, {arguments}
)
"""


# --- transformers ------------------------------------------------------------------------------------------


def write_vit(model: MUG, folder: Path) -> None:
    """ViTModel. Its pooler is the identity, so that `pooler_output` is the class token and no weight is missing."""
    width = model.config.width
    pooler = {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    _write_weights(folder, interchange.to_vit(interchange.to_timm(model.encoder)) | pooler)
    described = {"architectures": ["ViTModel"], "model_type": "vit", "pooler_act": "linear"}
    _write_json(folder / "config.json", described | _vit_sizes(model.config))
    write_processor(model.config, folder)


def read_vit(folder: Path, model: MUG, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    loaded = _from_pretrained("ViTModel", folder)
    return loaded(normalized(image_BCHW)).last_hidden_state, model.encoder(image_BCHW)


def vit_usage(config: ModelConfig) -> str:
    return f"""
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(".").eval()  # on the hub: "OWNER/NAME"
processor = AutoImageProcessor.from_pretrained(".")
inputs = processor(Image.open("photo.png").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs)
tokens = output.last_hidden_state  # [1, {1 + config.patches}, {config.width}]: class token, patches
feature = output.pooler_output  # [1, {config.width}], the class token
"""


def write_vitmae(model: MUG, folder: Path) -> None:
    """ViTMAEForPreTraining: encoder and pixel decoder.

    Raises:
        RunError: the pixel decoder was not trained.
    """
    config = model.config
    if "pixels" not in model.terms:
        raise RunError("vitmae: the pixel decoder was not trained (loss_weights.pixels is 0); choose another --format")
    _write_weights(folder, interchange.to_vitmae(interchange.to_mae(model)))
    described = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": config.pixel_width,
        "decoder_num_hidden_layers": config.pixel_depth,
        "decoder_num_attention_heads": config.pixel_heads,
        "decoder_intermediate_size": 4 * config.pixel_width,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.normalize_patches,
    }
    _write_json(folder / "config.json", described | _vit_sizes(config))
    write_processor(config, folder)


def read_vitmae(folder: Path, model: MUG, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions of the masked patches, and at the end the loss, of our masks."""
    config = model.config
    loaded = _from_pretrained("ViTMAEForPreTraining", folder)
    visible_BK, masked_BM = model.forward_mask(torch.arange(len(image_BCHW)))
    noise_BN = torch.ones(len(image_BCHW), config.patches).scatter_(1, visible_BK, 0.0)
    output = loaded(normalized(image_BCHW), noise=noise_BN)
    index = masked_BM[..., None].expand(-1, -1, config.patch_values)
    ours_BMP = model.pixel_decoder(model.encoder(image_BCHW, visible_BK), visible_BK, masked_BM)
    loss = masked_patch_loss(
        image_BCHW,
        ours_BMP,
        masked_BM,
        patch_size=config.patch_size,
        mean=PIXEL_MEAN,
        std=PIXEL_STD,
        normalize_patches=config.normalize_patches,
    )
    theirs = torch.cat([output.logits.gather(1, index).flatten(), output.loss.view(1)])
    return theirs, torch.cat([ours_BMP.flatten(), loss.view(1)])


def vitmae_usage(config: ModelConfig) -> str:
    return f"""
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained(".").eval()  # on the hub: "OWNER/NAME"
processor = AutoImageProcessor.from_pretrained(".")
inputs = processor(Image.open("photo.png").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs)
predicted = output.logits  # [1, {config.patches}, {config.patch_values}]: every patch, values as (row, column, channel)
loss = output.loss  # over the masked patches
"""


def write_processor(config: ModelConfig, folder: Path) -> None:
    """preprocessor_config.json: our central square, shorter side to S, bicubic, ImageNet's mean and deviation."""
    side = config.image_size
    described = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": PIXEL_MEAN,
        "image_std": PIXEL_STD,
    }
    _write_json(folder / "preprocessor_config.json", described)


def _vit_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "dtype": "float32",
    }


def _from_pretrained(name: str, folder: Path) -> nn.Module:
    """transformers' model of this folder, all of whose weights, and no others, are in the file."""
    transformers = load_package("transformers", EXTRA)
    loaded, said = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    strange = {kind: names for kind, names in said.items() if names}
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


def write_onnx(model: MUG, folder: Path) -> None:
    """model.onnx: fp32 `pixel_values` [batch, 3, S, S], normalised, to `last_hidden_state` [batch, 1 + N, D]."""
    load_package("onnxscript", EXTRA)
    config = model.config
    vit = timm.create_model(architecture(config), num_classes=0, **timm_arguments(config)).eval()
    vit.load_state_dict(interchange.to_timm(model.encoder))
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


def read_onnx(folder: Path, model: MUG, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    runtime = load_package("onnxruntime", EXTRA)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (tokens,) = session.run(None, {"pixel_values": normalized(image_BCHW).numpy()})
    return torch.from_numpy(tokens), model.encoder(image_BCHW)


def onnx_usage(config: ModelConfig) -> str:
    mean, std = list(PIXEL_MEAN), list(PIXEL_STD)
    return f"""
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
size = ({config.image_size}, {config.image_size})
image = ImageOps.fit(Image.open("photo.png").convert("RGB"), size, Image.Resampling.BICUBIC)
pixels = (np.asarray(image, np.float32) / 255 - {mean}) / {std}
batch = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # any number of images
(tokens,) = session.run(None, {{"pixel_values": batch}})
feature = tokens[:, 0]  # [1, {config.width}], the class token; the patches follow it
"""


# --- all ---------------------------------------------------------------------------------------------------

FORMATS = {
    "timm": Format("timm", (), write_timm, read_timm, timm_usage),
    "transformers": Format("transformers", ("transformers",), write_vit, read_vit, vit_usage),
    "vitmae": Format("transformers", ("transformers",), write_vitmae, read_vitmae, vitmae_usage),
    "onnx": Format("onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, read_onnx, onnx_usage),
}


def normalized(image_BCHW: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] as the other libraries take it: fp32, less the mean, over the deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (image_BCHW / 255 - mean) / std


def _write_weights(folder: Path, state: interchange.State) -> None:
    (folder / WEIGHTS).write_bytes(save(state, {"format": "pt"}))  # save_file's are for their owner alone


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
