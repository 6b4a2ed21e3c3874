"""Weights in the layouts of timm, MAE and transformers, to and from ours; and mBART's, to the parts of UniX².

The layouts are named after the library that loads them:
    timm     VisionTransformer's names: our encoder's, and `pos_embed`.
    mae      timm's names, and the pixel decoder as MAE published it (`decoder_embed`, `decoder_blocks.N.…`).
    vit      transformers' ViTModel, as its checkpoints on the hub have it (query, key and value apart).
    vitmae   transformers' ViTMAEForPreTraining, likewise.
Our positions are computed and never stored; the others keep them as a parameter, with a row of zeros for the class
token. Dimension letters: N patches, D width.
"""

import re
from typing import Protocol

import torch
from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.model.multilingual import FusionEncoder, MultilingualDecoder, MultilingualEncoder
from mug.model.pixel_decoder import PixelDecoder
from mug.model.presets import ModelConfigError

State = dict[str, Tensor]


class MaskedAutoencoder(Protocol):
    """An objective with MAE's two parts, MUG for example."""

    encoder: Encoder
    pixel_decoder: PixelDecoder


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
# The same of mBART's layers (transformers' MBartForConditionalGeneration).
MBART_BLOCK = {
    "norm1": "self_attn_layer_norm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "norm_cross": "encoder_attn_layer_norm",
    "cross_attn.q": "encoder_attn.q_proj",
    "cross_attn.k": "encoder_attn.k_proj",
    "cross_attn.v": "encoder_attn.v_proj",
    "cross_attn.proj": "encoder_attn.out_proj",
    "norm2": "final_layer_norm",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
MBART_OUTSIDE = {
    "embed_tokens.weight": "words.embed.weight",
    "embed_positions.weight": "words.position_embed",
    "layernorm_embedding.weight": "words.norm.weight",
    "layernorm_embedding.bias": "words.norm.bias",
    "layer_norm.weight": "norm.weight",
    "layer_norm.bias": "norm.bias",
}
MBART_FIRST_POSITION = 2  # the rows before it belong to fairseq's padding
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
# What a file may hold in addition to an encoder.
NOT_ENCODER = ("decoder", "mask_token", "embeddings.mask_token", "head.", "classifier.", "pooler.")


def to_timm(encoder: Encoder) -> State:
    """Returns the encoder as timm's VisionTransformer (class token, no head) loads it."""
    state = _copied(encoder)
    state.pop("positions_ND", None)  # a parameter where they were trained
    return {**state, "pos_embed": _with_class_row(encoder.positions_ND.detach())}


def to_mae(model: MaskedAutoencoder) -> State:
    """Returns encoder and pixel decoder in MAE's layout; its decoder predicts every patch, ours the masked ones."""
    decoder = {_decoder_name(name): value for name, value in _copied(model.pixel_decoder).items()}
    positions = {"decoder_pos_embed": _with_class_row(model.pixel_decoder.positions_ND)}
    return {**to_timm(model.encoder), **decoder, **positions}


def to_vit(timm: State) -> State:
    """Returns timm's layout as transformers' ViTModel has it on the hub, without its pooler."""
    return {_hub_name(name): value for name, value in _split_qkv(timm).items()}


def to_vitmae(mae: State) -> State:
    """Returns MAE's layout as transformers' ViTMAEForPreTraining has it on the hub."""
    named = to_vit(mae)
    return {name if name.startswith("decoder.") else f"vit.{name}": value for name, value in named.items()}


def as_mae(state: State) -> State:
    """Returns a state dict of any of the four layouts, in timm's and MAE's names; unknown names stay as they are.

    transformers' names may be the hub's or those inside its version 5 (`model.state_dict()`).
    """
    state = {name.removeprefix("vit."): value for name, value in state.items()}
    if not any(name.startswith("embeddings.") for name in state):
        return dict(state)
    return _merge_qkv({_timm_name(name): value for name, value in state.items()})


def load_encoder(encoder: Encoder, state: State) -> None:
    """Load an encoder of any of the four layouts, with its positions; heads and decoders are left out.

    Learned positions of patches go into the encoder's table, which our checkpoints do not keep: the features are
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


def load_mae(model: MaskedAutoencoder, state: State) -> None:
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


class Multilingual(Protocol):
    """An objective with mBART's parts, UniX² for example."""

    text_encoder: MultilingualEncoder
    fusion_encoder: FusionEncoder
    decoder: MultilingualDecoder


def load_mbart(model: Multilingual, state: State) -> None:
    """Load text encoder and decoder from mBART's layout, and the fusion encoder's blocks as a second copy of the
    encoder's. Of its positions ours has the first; the rest of the fusion encoder stays as it is.

    Raises:
        ModelConfigError: weights of another size, or of another kind of model; the first one is named.
    """
    state = {name.removeprefix("model."): value for name, value in state.items()}
    if state.get("final_logits_bias", torch.zeros(1)).any():
        raise ModelConfigError("final_logits_bias is not 0; the decoder's head has no bias")
    encoder, decoder = (_mbart_part(state, f"{part}.") for part in ("encoder", "decoder"))
    for part, given in ((model.text_encoder, encoder), (model.decoder, decoder)):
        wanted = {name: value for name, value in part.state_dict().items() if name != "head.weight"}
        given["words.position_embed"] = given["words.position_embed"][: len(wanted["words.position_embed"])]
        _check(part, given, wanted)
        part.load_state_dict(given, strict=False)  # without the head, whose matrix is the embedding
    stack = ("blocks.", "norm.")
    shared = {name: value for name, value in encoder.items() if name.startswith(stack)}
    wanted = {name: value for name, value in model.fusion_encoder.state_dict().items() if name.startswith(stack)}
    _check(model.fusion_encoder, shared, wanted)
    model.fusion_encoder.load_state_dict(shared, strict=False)


def _mbart_part(state: State, prefix: str) -> State:
    """Returns mBART's encoder or decoder in our names."""
    theirs = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    parts = {name: ours for ours, name in MBART_BLOCK.items()}
    given: State = {}
    for name, value in theirs.items():
        block = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if block and block[2] in parts:
            given[f"blocks.{block[1]}.{parts[block[2]]}.{block[3]}"] = value
        else:
            given[MBART_OUTSIDE.get(name, name)] = value
    if "words.position_embed" not in given:
        raise ModelConfigError(f"missing key {prefix}embed_positions.weight: not an mBART")
    given["words.position_embed"] = given["words.position_embed"][MBART_FIRST_POSITION:]
    return _merged(_merge_qkv(given))


def _merged(state: State) -> State:
    """Returns the state with key and value of cross-attention joined."""
    merged = {name: value for name, value in state.items() if not re.search(r"\.cross_attn\.[kv]\.", name)}
    for name, value in state.items():
        if ".cross_attn.k." in name and (other := state.get(name.replace(".k.", ".v."))) is not None:
            merged[name.replace(".k.", ".kv.")] = torch.cat([value, other])
    return merged


def _copied(module: nn.Module) -> State:
    return {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}


def _with_class_row(positions_ND: Tensor) -> Tensor:
    """Returns [1, 1 + N, D], zeros for the class token."""
    return nn.functional.pad(positions_ND, (0, 0, 1, 0))[None].clone()


def _check(module: nn.Module, given: State, wanted: State) -> None:
    kind = type(module).__name__.lower()
    for name in wanted:
        if name not in given:
            raise ModelConfigError(f"missing key {name}: not a ViT that the {kind} can be loaded from")
        if given[name].shape != wanted[name].shape:
            theirs, ours = tuple(given[name].shape), tuple(wanted[name].shape)
            raise ModelConfigError(f"the weights have another size: {name} is {theirs}, but {ours} in the {kind}")
    unknown = sorted(given.keys() - wanted.keys())
    if unknown:
        raise ModelConfigError(f"unexpected key {unknown[0]}: not a plain ViT")


def _decoder_name(name: str) -> str:
    """Returns the name of a pixel decoder's parameter in MAE's layout."""
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
            found = [state.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            thirds = [third for third in found if third is not None]
            if len(thirds) == 3:  # else the merged one is missing, and reported as such
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
