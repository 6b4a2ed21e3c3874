"""Weights in the layouts of timm, MAE and transformers, to and from ours.

The layouts are named after who loads them:
    timm     VisionTransformer's names: our encoder's, and `pos_embed`.
    mae      timm's names, and the pixel decoder as MAE published it (`decoder_embed`, `decoder_blocks.N.…`).
    vit      transformers' ViTModel, as its checkpoints on the hub have it (query, key and value apart).
    vitmae   transformers' ViTMAEForPreTraining, likewise.
Our positions are computed and never stored; the others keep them as a parameter, with a row of zeros for the class
token. Dimension letters: N patches, D width.
"""

import re

import torch
from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.model.mug import MUG
from mug.model.presets import ModelConfigError

State = dict[str, Tensor]

# A ViT block's parts: timm's name → transformers' on the hub, and inside its version 5.
BLOCK = {
    "norm1": ("layernorm_before", "layernorm_before"),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
# What stands before a block's number. The last of a row is what transformers 5 writes for a decoder by accident.
STACKS = {
    "blocks.": ("encoder.layer.", "layers."),
    "decoder_blocks.": ("decoder.decoder_layers.", "decoder.decoder_encoder.layer."),
}
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
PIXEL_DECODER = {
    "embed.": "decoder_embed.",
    "blocks.": "decoder_blocks.",
    "norm.": "decoder_norm.",
    "pred.": "decoder_pred.",
}
NOT_ENCODER = ("decoder", "mask_token", "head.", "classifier.", "pooler.")  # what a file may hold beside an encoder


def to_timm(encoder: Encoder) -> State:
    """The encoder as timm's VisionTransformer (class token, no head) loads it."""
    return {**_copied(encoder), "pos_embed": _with_class_row(encoder.positions_ND)}


def to_mae(model: MUG) -> State:
    """Encoder and pixel decoder in MAE's layout; its decoder predicts every patch, ours the masked ones."""
    decoder = {_decoder_name(name): value for name, value in _copied(model.pixel_decoder).items()}
    positions = {"decoder_pos_embed": _with_class_row(model.pixel_decoder.positions_ND)}
    return {**to_timm(model.encoder), **decoder, **positions}


def to_vit(timm: State) -> State:
    """timm's layout as transformers' ViTModel has it on the hub, without its pooler."""
    return {_hub_name(name): value for name, value in _split_qkv(timm).items()}


def to_vitmae(mae: State) -> State:
    """MAE's layout as transformers' ViTMAEForPreTraining has it on the hub."""
    named = to_vit(mae)
    return {name if name.startswith("decoder.") else f"vit.{name}": value for name, value in named.items()}


def as_mae(state: State) -> State:
    """A state dict of any of the four layouts, in timm's and MAE's names; unknown names stay as they are.

    transformers' names may be the hub's or those inside its version 5 (`model.state_dict()`).
    """
    state = {name.removeprefix("vit."): value for name, value in state.items()}
    if not any(name.startswith("embeddings.") for name in state):
        return dict(state)
    return _merge_qkv({_timm_name(name): value for name, value in state.items()})


def load_encoder(encoder: Encoder, state: State) -> None:
    """Load an encoder of any of the four layouts, with its positions; heads and decoders are left out.

    Learned positions of patches go into the encoder's table, which no checkpoint of ours keeps: the features are
    those of the loaded model, but training from such weights would have to make the table a parameter.

    Raises:
        ModelConfigError: weights of another size, or of another kind of ViT; the first one is named.
    """
    given = {name: value for name, value in as_mae(state).items() if not name.startswith(NOT_ENCODER)}
    _check(encoder, given, to_timm(encoder))
    positions_1ND = given.pop("pos_embed")
    given["cls_token"] = given["cls_token"] + positions_1ND[:, :1]
    encoder.load_state_dict(given)
    encoder.positions_ND.copy_(positions_1ND[0, 1:])


def load_mae(model: MUG, state: State) -> None:
    """Load encoder and pixel decoder from MAE's layout or transformers' ViTMAE; the text decoder stays as it is.

    Raises:
        ModelConfigError: weights of another size, or without a decoder of MAE's kind; the first one is named.
    """
    given = as_mae(state)
    decoder = {name: value for name, value in given.items() if name.startswith(("decoder_", "mask_token"))}
    wanted = {name: value for name, value in to_mae(model).items() if name.startswith(("decoder_", "mask_token"))}
    _check(model.pixel_decoder, decoder, wanted)
    positions_1ND = decoder.pop("decoder_pos_embed")
    if positions_1ND[:, 0].any():
        raise ModelConfigError("decoder_pos_embed moves the class token, for which MAE's decoder and ours have zeros")
    load_encoder(model.encoder, given)
    ours = {_decoder_name(name): name for name in model.pixel_decoder.state_dict()}
    model.pixel_decoder.load_state_dict({ours[name]: value for name, value in decoder.items()})
    model.pixel_decoder.positions_ND.copy_(positions_1ND[0, 1:])


def _copied(module: nn.Module) -> State:
    return {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}


def _with_class_row(positions_ND: Tensor) -> Tensor:
    """[1, 1 + N, D], zeros for the class token."""
    return nn.functional.pad(positions_ND, (0, 0, 1, 0))[None].clone()


def _check(module: nn.Module, given: State, wanted: State) -> None:
    kind = type(module).__name__.lower()
    for name in wanted:
        if name not in given:
            raise ModelConfigError(f"the weights lack {name}: this is no ViT that our {kind} could be loaded from")
        if given[name].shape != wanted[name].shape:
            theirs, ours = tuple(given[name].shape), tuple(wanted[name].shape)
            raise ModelConfigError(f"the weights are of another size: {name} is {theirs}, our {kind}'s is {ours}")
    unknown = sorted(given.keys() - wanted.keys())
    if unknown:
        raise ModelConfigError(f"the weights hold {unknown[0]}, which our {kind} has not: another kind of ViT")


def _decoder_name(name: str) -> str:
    """A name of our pixel decoder in MAE's layout."""
    for ours, mae in PIXEL_DECODER.items():
        if name.startswith(ours):
            return mae + name.removeprefix(ours)
    return name  # mask_token


def _split_qkv(state: State) -> State:
    parts: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                parts[name.replace(".qkv.", f".{part}.")] = piece.clone()
        else:
            parts[name] = value
    return parts


def _merge_qkv(state: State) -> State:
    merged = {name: value for name, value in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in state:
        if ".attn.q." in name:
            thirds = [state.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            if all(third is not None for third in thirds):  # else the merged one is missed, and said to be
                merged[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(thirds)
    return merged


def _hub_name(name: str) -> str:
    block = re.fullmatch(r"((?:decoder_)?blocks\.)(\d+)\.(.+)\.(weight|bias)", name)
    if block:
        return f"{STACKS[block[1]][0]}{block[2]}.{BLOCK[block[3]][0]}.{block[4]}"
    return OUTSIDE.get(name) or f"decoder.{name}"


def _timm_name(name: str) -> str:
    stacks = {theirs: ours for ours, names in STACKS.items() for theirs in names}
    parts = {theirs: ours for ours, names in BLOCK.items() for theirs in names}
    block = re.fullmatch(r"(.+?\.)(\d+)\.(.+)\.(weight|bias)", name)
    if block and block[1] in stacks and block[3] in parts:
        return f"{stacks[block[1]]}{block[2]}.{parts[block[3]]}.{block[4]}"
    outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
    return outside.get(name) or name.removeprefix("decoder.")
