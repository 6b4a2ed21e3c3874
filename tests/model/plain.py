"""Transformers written out in float64, a sample at a time: what objectives are compared with.

Functions take `p`, the parameters by name, and `name`, that of a module. Dimension letters: N tokens, M tokens of a
memory, D width, H heads.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from noise import noisy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mug.kernels import attention
from mug.model.objectives.objective import Context, Objective
from mug.model.presets import Vocabulary, resolve

Parameters = dict[str, Tensor]
VOCABULARY = Vocabulary(20, pad=0, bos=1, eos=2, mask=3)
CONTEXT = Context(seed=5, vocabulary=VOCABULARY)
ENCODER = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}


def parameters(model: nn.Module) -> Parameters:
    """Float64 copies of a model's parameters."""
    return {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}


def build(objective: type[Objective], sizes: dict, context: Context = CONTEXT) -> Any:
    """An objective of these sizes, with noise."""
    torch.manual_seed(0)
    return noisy(objective(resolve(objective.Config(**sizes)), context))


def pairs(words: list[int | None], length: int = 8, size: int = 32) -> dict[str, Tensor]:
    """A batch of random images and captions of so many words; None is a sample without caption."""
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.zeros(len(words), length, dtype=torch.int64)
    for tokens_T, count in zip(tokens_BT, words, strict=True):
        if count is not None:
            caption = torch.randint(4, VOCABULARY.size, (count,), generator=generator)
            tokens_T[: count + 2] = torch.tensor([1, *caption, 2])
    image = torch.randint(0, 256, (len(words), 3, size, size), generator=generator, dtype=torch.uint8)
    return {"image": image, "tokens": tokens_BT, "position": 1000 * torch.arange(len(words)) + 5}


def rows(batch: dict[str, Tensor], *which: int) -> dict[str, Tensor]:
    """These samples of a batch."""
    return {key: value[list(which)] for key, value in batch.items()}


# --- Modules ------------------------------------------------------------------------------------------------


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    variance = x.var(-1, correction=0, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def attend(q_ND: Tensor, k_MD: Tensor, v_MD: Tensor, heads: int, sees_NM: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q_ND, k_MD, v_MD))
    scores_HNM = q @ k.mT / q.shape[-1] ** 0.5
    weights_HNM = scores_HNM.masked_fill(~sees_NM, -torch.inf).softmax(-1)
    return (weights_HNM @ v).transpose(0, 1).flatten(1)


def block(p: Parameters, name: str, heads: int, x: Tensor, sees_NN: Tensor, memory_MD: Tensor | None = None) -> Tensor:
    q, k, v = linear(p, f"{name}.attn.qkv", norm(p, f"{name}.norm1", x)).chunk(3, -1)
    x = x + linear(p, f"{name}.attn.proj", attend(q, k, v, heads, sees_NN))
    if memory_MD is not None:
        q = linear(p, f"{name}.cross_attn.q", norm(p, f"{name}.norm_cross", x))
        k, v = linear(p, f"{name}.cross_attn.kv", memory_MD).chunk(2, -1)
        all_NM = torch.ones(len(q), len(k), dtype=torch.bool)
        x = x + linear(p, f"{name}.cross_attn.proj", attend(q, k, v, heads, all_NM))
    hidden = nn.functional.gelu(linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.norm2", x)))
    return x + linear(p, f"{name}.mlp.fc2", hidden)


def prefix_mask(N: int, prefix: int) -> Tensor:
    """bool [N, N]: each query sees the prefix, and the keys up to its own."""
    key_N = torch.arange(N)
    return (key_N < prefix) | (key_N <= key_N[:, None])


def normalized(image_CHW: Tensor) -> Tensor:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[..., None, None]
    return (image_CHW.double() / 255 - mean) / std


def patches(image_CHW: Tensor, size: int) -> Tensor:
    """[N, P] of the normalised image, values ordered (row, column, channel)."""
    cut = normalized(image_CHW).unfold(1, size, size).unfold(2, size, size)  # [3, g, g, size, size]
    return cut.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def standardized(patches_NP: Tensor) -> Tensor:
    """Each patch less its mean, over its standard deviation, as MAE regresses it."""
    return (patches_NP - patches_NP.mean(-1, keepdim=True)) / (patches_NP.var(-1, keepdim=True) + 1e-6).sqrt()


def encode(
    p: Parameters,
    model: nn.Module,
    image_CHW: Tensor,
    visible: Tensor | None = None,
    words_WD: Tensor | None = None,
    sees_NN: Tensor | None = None,
    name: str = "encoder",
) -> Tensor:
    """[1 + K + W, D], what the encoder makes of an image's visible patches, and of words."""
    config = model.config
    weight, bias = p[f"{name}.patch_embed.proj.weight"], p[f"{name}.patch_embed.proj.bias"]
    patch_ND = nn.functional.conv2d(normalized(image_CHW)[None], weight, bias, stride=config.patch_size)
    patch_ND = patch_ND[0].flatten(1).T + p.get("encoder.positions_ND", model.encoder.positions_ND.double())
    patch_ND = patch_ND if visible is None else patch_ND[visible]
    parts = [p[f"{name}.cls_token"][0], patch_ND] + ([] if words_WD is None else [words_WD])
    x = torch.cat(parts)
    sees_NN = torch.ones(len(x), len(x), dtype=torch.bool) if sees_NN is None else sees_NN
    for layer in range(config.depth):
        x = block(p, f"{name}.blocks.{layer}", config.heads, x, sees_NN)
    return norm(p, f"{name}.norm", x)


# --- Comparisons --------------------------------------------------------------------------------------------


def assert_same_losses_and_gradients(model: nn.Module, batch: dict[str, Tensor], expected: dict, p: Parameters) -> None:
    """The model's losses of a batch are the expected ones, and so is the gradient of every parameter that trains, none
    of which is 0."""
    losses, _ = model(batch)
    assert list(losses) == list(expected)
    for name, value in losses.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    sum(model.losses[name] * value for name, value in losses.items()).backward()
    sum(model.losses[name] * value for name, value in expected.items()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def assert_micro_batches_add_up(model: nn.Module, batch: dict[str, Tensor], cuts: list[list[int]]) -> None:
    """The losses of a batch are those of its parts, weighted by what `counts` counts."""
    with torch.no_grad():
        entire, counts = model(batch)[0], model.counts(batch)
        parts = [(model(part)[0], model.counts(part)) for part in (rows(batch, *which) for which in cuts)]
    for name, value in entire.items():
        assert sum(count[name] for _, count in parts) == counts[name]
        total = sum(losses[name] * count[name] for losses, count in parts) / counts[name]
        torch.testing.assert_close(total, value, rtol=1e-5, atol=1e-6)


def assert_captions_are_likeliest(tokens_BT: Tensor, logits_BTV: Tensor) -> None:
    """Of these captions each token has the highest logit after those before it, but for PAD and BOS."""
    best_BT = logits_BTV[..., 2:].argmax(-1)[:, :-1] + 2
    written_BT = tokens_BT[:, 1:] != 0
    assert torch.equal(best_BT[written_BT], tokens_BT[:, 1:][written_BT])


def with_one_loss(whole: Any, loss: str, absent: str) -> Any:
    """The objective with one of its losses, and the weights of `whole`; it lacks the parameter `absent`."""
    alone = type(whole)(whole.config, dataclasses.replace(whole.context, losses=(loss,)))
    names = {name for name, _ in alone.named_parameters()}
    assert absent not in names and {name for name, _ in whole.named_parameters()} > names
    alone.load_state_dict({name: value for name, value in whole.state_dict().items() if name in names})
    return alone


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the FLOP of what is computed; attention by its reference, as PyTorch 2.11 counts no flash attention on
    CPUs."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), FlopCounterMode(display=False) as counter:
        patch.setattr(attention, "DEFAULT_BACKEND", "reference")
        yield counter
