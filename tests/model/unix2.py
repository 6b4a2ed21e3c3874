"""UniX² written out in float64, a sample at a time: what the objective is compared with; and batches of all kinds."""

import torch
from plain import Parameters, attend, linear
from torch import Tensor, nn

from mug.data.kinds.samples import Batch
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.objective import Context
from mug.model.objectives.unix2 import UniX2
from mug.model.presets import Vocabulary, resolve

VOCABULARY = Vocabulary(30, pad=0, bos=1, eos=2, mask=3, languages=("en", "de"), language_ids=(4, 5))
SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "text_width": 24, "text_heads": 2}
SIZES |= {"text_length": 14, "text_layers": 1, "fusion_layers": 1, "decoder_layers": 1, "embedding_width": 8}
KINDS = ("pairs", "bitext", "text", "image_bitext")


def make(losses: tuple[str, ...] = ()) -> UniX2:
    torch.manual_seed(1)  # with 0, the images' embeddings are so alike that fp32 cancels in CMCL
    return UniX2(resolve(MultilingualConfig(**SIZES)), Context(seed=3, vocabulary=VOCABULARY, losses=losses))


def batch_at(kind: str, positions: range | list[int], size: int = 16) -> Batch:
    """Samples by their positions alone, with texts of 1 to 10 words; each fifth lacks them, or one of two."""
    made = [_sample(kind, position, size) for position in positions]
    return Batch(kind, {name: torch.stack([sample[name] for sample in made]) for name in made[0]})


def _sample(kind: str, position: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(position)
    image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
    one, other = (torch.randint(6, 30, (1 + (position * 7 + i) % 10,), generator=generator) for i in (0, 4))
    language = 4 + position % 2
    source, target = _filled([1, *one, 2, language]), _filled([9 - language, *other, 2])
    if position % 5 == 0:
        source = torch.zeros_like(source)
    if position % 5 == 1 and "bitext" in kind:
        target = torch.zeros_like(target)
    texts = {"source": source, "target": target} if "bitext" in kind else {"tokens": source}
    pixels = {"image": image} if kind in ("pairs", "image_bitext") else {}
    return {**pixels, **texts, "position": torch.tensor(position)}


def _filled(tokens: list) -> Tensor:
    return torch.tensor([*tokens, *[0] * (SIZES["text_length"] - len(tokens))])


# --- The model, of one sample -------------------------------------------------------------------------------


def norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def block(p: Parameters, name: str, x: Tensor, causal: bool = False, memory: Tensor | None = None) -> Tensor:
    q, k, v = linear(p, f"{name}.attn.qkv", norm(p, f"{name}.norm1", x)).chunk(3, -1)
    sees = torch.ones(len(x), len(x), dtype=torch.bool)
    x = x + linear(p, f"{name}.attn.proj", attend(q, k, v, SIZES["text_heads"], sees.tril() if causal else sees))
    if memory is not None:
        q = linear(p, f"{name}.cross_attn.q", norm(p, f"{name}.norm_cross", x))
        k, v = linear(p, f"{name}.cross_attn.kv", memory).chunk(2, -1)
        sees = torch.ones(len(q), len(k), dtype=torch.bool)
        x = x + linear(p, f"{name}.cross_attn.proj", attend(q, k, v, SIZES["text_heads"], sees))
    return x + linear(
        p, f"{name}.mlp.fc2", nn.functional.gelu(linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.norm2", x)))
    )


def words(p: Parameters, name: str, tokens: Tensor) -> Tensor:
    x = p["head.weight"][tokens] * SIZES["text_width"] ** 0.5 + p[f"{name}.words.position_embed"][: len(tokens)]
    return norm(p, f"{name}.words.norm", x)


def read(p: Parameters, tokens: Tensor) -> Tensor:
    """States of a text without padding."""
    return norm(p, "text_encoder.norm", block(p, "text_encoder.blocks.0", words(p, "text_encoder", tokens)))


def fuse(p: Parameters, image_LD: Tensor | None, text_TD: Tensor) -> Tensor:
    parts = [p["fusion_encoder.cls_D"][None], text_TD + p["fusion_encoder.text_type_D"]]
    if image_LD is not None:
        image = norm(p, "fusion_encoder.image_norm", linear(p, "fusion_encoder.image_projection", image_LD))
        parts.insert(1, image + p["fusion_encoder.image_type_D"])
    return norm(p, "fusion_encoder.norm", block(p, "fusion_encoder.blocks.0", torch.cat(parts)))


def write_loss(p: Parameters, target: list[int], memory: Tensor) -> tuple[Tensor, int]:
    """(sum of the losses, tokens) of a target."""
    x = block(p, "decoder.blocks.0", words(p, "decoder", torch.tensor(target)), True, memory)
    log_p = (norm(p, "decoder.norm", x) @ p["head.weight"].T).log_softmax(-1)
    return -sum(log_p[t, token] for t, token in enumerate(target[1:])), len(target) - 1


def masked_loss(p: Parameters, x_FD: Tensor, before: int, truth: dict[int, int]) -> tuple[Tensor, int]:
    """(sum, words) of the hidden words, by their places in the text, which `before` states precede."""
    total = torch.zeros((), dtype=torch.float64)
    for place, token in truth.items():
        hidden = nn.functional.gelu(linear(p, "masked_head.transform", x_FD[before + place]))
        total = total - (norm(p, "masked_head.norm", hidden) @ p["head.weight"].T).log_softmax(-1)[token]
    return total, len(truth)


def contrast(one: Tensor, other: Tensor, log_scale: Tensor) -> Tensor:
    """Equation 1, of vectors that are not yet normalised."""
    one, other = (x / x.norm(dim=-1, keepdim=True) for x in (one, other))
    logits = one @ other.T * log_scale.exp()
    return -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean()
