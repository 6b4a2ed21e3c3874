"""Weights in the layouts of timm, MAE and transformers, to and from ours; mBART's and XLM-R's, to the parts of UniX².

The layouts are named after the library that loads them:
    timm     VisionTransformer's names: our encoder's, and `pos_embed`.
    mae      timm's names, and the pixel decoder as MAE published it (`decoder_embed`, `decoder_blocks.N.…`).
    vit      transformers' ViTModel, as its checkpoints on the hub have it (query, key and value apart).
    vitmae   transformers' ViTMAEForPreTraining, likewise.
Our positions are computed and never stored; the others keep them as a parameter, with a row of zeros for the class
token. Dimension letters: N patches, D width.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.model.multilingual import NORM_EPS, FusionEncoder, MultilingualConfig, MultilingualDecoder, MultilingualEncoder
from mug.model.pixel_decoder import PixelDecoder
from mug.model.presets import ModelConfigError, Vocabulary

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
# The same of XLM-R's (transformers' XLMRobertaModel).
XLMR_BLOCK = {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
XLMR_OUTSIDE = {
    "embeddings.word_embeddings.weight": "words.embed.weight",
    "embeddings.position_embeddings.weight": "words.position_embed",
    "embeddings.LayerNorm.weight": "words.norm.weight",
    "embeddings.LayerNorm.bias": "words.norm.bias",
}
XLMR_TYPE = "embeddings.token_type_embeddings.weight"  # of one type: a constant
NOT_XLMR = ("pooler.", "lm_head.", "classifier.", "embeddings.position_ids")  # what a file may hold in addition
FIRST_POSITION = 2  # the rows before it belong to fairseq's padding, in mBART and XLM-R
WORDS, POSITIONS, STACK = "words.embed.weight", "words.position_embed", ("blocks.", "norm.")
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


class Multilingual(Protocol):
    """An objective whose parts are those of mBART or XLM-R, UniX² for example."""

    config: MultilingualConfig
    text_encoder: MultilingualEncoder
    fusion_encoder: FusionEncoder
    decoder: MultilingualDecoder

    @property
    def vocabulary(self) -> Vocabulary: ...


def load_language_model(model: Multilingual, state: State, settings: Mapping[str, Any]) -> None:
    """Load the parts that read and write text from a language model; `settings`: transformers' config.json of it.

    Of its positions ours has the first. Where our tokenizer has further language tokens, at its end, they stay as
    they are.

    Raises:
        ModelConfigError: weights of another size, or of a model that computes something else; the first one is named.
    """
    kind = str(settings.get("model_type"))
    if kind not in LANGUAGE_MODELS:
        raise ModelConfigError(f"model_type is {kind}: only {' and '.join(LANGUAGE_MODELS)} can be read")
    text_model, defaults, load = LANGUAGE_MODELS[kind]
    if model.config.text_model != text_model:
        raise ModelConfigError(f"a {kind} needs model.text_model {text_model}, not {model.config.text_model}")
    stated, ours = defaults | dict(settings), COMPUTED | dict.fromkeys(HEADS, model.config.text_heads)
    for name in defaults:
        if stated[name] != ours[name]:
            raise ModelConfigError(f"{name} is {stated[name]} there, {ours[name]} here")
    load(model, state)


def load_mbart(model: Multilingual, state: State) -> None:
    """Load text encoder and decoder from mBART's layout, and the fusion encoder's blocks as a second copy of the
    encoder's; the rest of the fusion encoder stays as it is. See `load_language_model`.

    Raises:
        ModelConfigError: weights of another size, or of another kind of model; the first one is named.
    """
    state = {name.removeprefix("model."): value for name, value in state.items()}
    if state.get("final_logits_bias", torch.zeros(1)).any():
        raise ModelConfigError("final_logits_bias is not 0; the decoder's head has no bias")
    encoder, decoder = (_mbart_part(state, f"{part}.") for part in ("encoder", "decoder"))
    _load_text(model, model.text_encoder, encoder)
    _load_text(model, model.decoder, decoder)
    _load_text(model, model.fusion_encoder, {name: x for name, x in encoder.items() if name.startswith(STACK)})


def load_xlmr(model: Multilingual, state: State) -> None:
    """Load the text encoder from the embeddings and first layers of XLM-R's layout, and the fusion encoder's blocks
    from the layers that follow, as table 4 of UniX² has them; all else stays as it is. See `load_language_model`.

    Raises:
        ModelConfigError: weights of another size, or of another kind of model; the first one is named.
    """
    state = {name.removeprefix("roberta."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(NOT_XLMR)}
    if XLMR_TYPE not in state or "embeddings.position_embeddings.weight" not in state:
        raise ModelConfigError(f"missing key {XLMR_TYPE}: not an XLM-R")
    of_type = state.pop(XLMR_TYPE)
    if len(of_type) != 1:
        raise ModelConfigError(f"{XLMR_TYPE} has {len(of_type)} types of tokens: not an XLM-R")
    given = _merge_qkv(_renamed(state, r"encoder\.layer", XLMR_BLOCK, XLMR_OUTSIDE))
    given[POSITIONS] = given[POSITIONS][FIRST_POSITION:] + of_type
    first: State = {}
    second: State = {}
    for name, value in given.items():
        number = int(found[1]) if (found := re.match(r"blocks\.(\d+)\.", name)) else 0
        later = number - model.config.text_layers
        part, of_part = (first, number) if later < 0 else (second, later)
        part[name.replace(f"blocks.{number}.", f"blocks.{of_part}.")] = value
    _load_text(model, model.text_encoder, first)
    _load_text(model, model.fusion_encoder, second)


# What our parts compute, in the words of config.json; there a value may be left out that is the library's default.
COMPUTED = {"activation_function": "gelu", "scale_embedding": True, "hidden_act": "gelu", "layer_norm_eps": NORM_EPS}
HEADS = ("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads")
MBART_DEFAULTS = {"activation_function": "gelu", "scale_embedding": False} | dict.fromkeys(HEADS[:2], 16)
XLMR_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12}
# transformers' model_type → model.text_model, these defaults, how it is read.
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any], Callable[[Multilingual, State], None]]] = {
    "mbart": ("mbart", MBART_DEFAULTS, load_mbart),
    "xlm-roberta": ("xlmr", XLMR_DEFAULTS, load_xlmr),
}


@torch.no_grad()
def _load_text(model: Multilingual, part: nn.Module, given: State) -> None:
    """Load a part that reads or writes text: all of it but the head, whose matrix is the embedding; of the fusion
    encoder the stack of blocks."""
    wanted = {name: value for name, value in part.state_dict().items() if name != "head.weight"}
    if part is model.fusion_encoder:
        wanted = {name: value for name, value in wanted.items() if name.startswith(STACK)}
    if (words := given.get(WORDS)) is not None:
        more = len(wanted[WORDS]) - len(words)
        if 0 < more <= len(model.vocabulary.languages):
            given[WORDS] = torch.cat([words, wanted[WORDS][-more:].to(words)])
        given[POSITIONS] = given[POSITIONS][: len(wanted[POSITIONS])]
    _check(part, given, wanted)
    part.load_state_dict(given, strict=False)


def _mbart_part(state: State, prefix: str) -> State:
    """Returns mBART's encoder or decoder in our names."""
    theirs = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if "shared.weight" in state:  # a file holds a matrix once
        theirs.setdefault("embed_tokens.weight", state["shared.weight"])
    given = _renamed(theirs, "layers", MBART_BLOCK, MBART_OUTSIDE)
    if POSITIONS not in given:
        raise ModelConfigError(f"missing key {prefix}embed_positions.weight: not an mBART")
    given[POSITIONS] = given[POSITIONS][FIRST_POSITION:]
    return _merged(_merge_qkv(given))


def _renamed(state: State, stack: str, block: Mapping[str, str], outside: Mapping[str, str]) -> State:
    """Returns the state in our names; `stack` stands before a layer's number, `block` and `outside` have ours → theirs
    and theirs → ours. Unknown names stay as they are."""
    parts = {theirs: ours for ours, theirs in block.items()}
    given: State = {}
    for name, value in state.items():
        layer = re.fullmatch(rf"{stack}\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer and layer[2] in parts:
            given[f"blocks.{layer[1]}.{parts[layer[2]]}.{layer[3]}"] = value
        else:
            given[outside.get(name, name)] = value
    return given


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
            raise ModelConfigError(f"missing key {name}: not weights that the {kind} can be loaded from")
        if given[name].shape != wanted[name].shape:
            theirs, ours = tuple(given[name].shape), tuple(wanted[name].shape)
            raise ModelConfigError(f"the weights have another size: {name} is {theirs}, but {ours} in the {kind}")
    unknown = sorted(given.keys() - wanted.keys())
    if unknown:
        raise ModelConfigError(f"unexpected key {unknown[0]}, which the {kind} does not have")


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
