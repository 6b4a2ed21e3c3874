"""I-JEPA: the formulae of arXiv 2301.08243 in float64, block by block; its masks; its teacher."""

import pytest
import torch
from plain import (
    ENCODER,
    assert_micro_batches_add_up,
    assert_same_losses_and_gradients,
    block,
    build,
    counted_flops,
    encode,
    linear,
    norm,
    pairs,
    parameters,
)

from mug.model.momentum import student_names
from mug.model.objectives.ijepa import IJEPA, IJEPAConfig
from mug.model.presets import ModelConfigError, resolve

SIZES = ENCODER | {"image_size": 48, "predictor_width": 16, "predictor_depth": 2}


def make(**options) -> IJEPA:
    return build(IJEPA, SIZES | options)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs([None] * 4, size=48)


def all_of(count: int) -> torch.Tensor:
    return torch.ones(count, count, dtype=torch.bool)


def expected(model: IJEPA, p: dict, batch: dict) -> dict[str, torch.Tensor]:
    masks, errors = model.masks(batch["position"]), []
    positions_ND = model.predictor.positions_ND.double()
    for b, image in enumerate(batch["image"]):
        context_K = masks.context_BK[b, : masks.context_B[b]]
        x = linear(p, "predictor.embed", encode(p, model, image, context_K, name="context_encoder"))
        target_ND = encode(p, model, image).detach()[1:]
        centred_ND = target_ND - target_ND.mean(-1, keepdim=True)
        target_ND = centred_ND / (centred_ND.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        context_LD = torch.cat([x[:1], x[1:] + positions_ND[context_K]])
        for target_M in masks.target_BJM[b, :, : masks.target_B[b]]:
            x = torch.cat([context_LD, p["predictor.mask_token"][0] + positions_ND[target_M]])
            for layer in range(2):
                x = block(p, f"predictor.blocks.{layer}", 2, x, all_of(len(x)))
            predicted_MD = linear(p, "predictor.proj", norm(p, "predictor.norm", x[len(context_LD) :]))
            error = (predicted_MD - target_ND[target_M]).abs()
            errors.append(torch.where(error < 1, error**2 / 2, error - 0.5).flatten())
    return {"latents": torch.cat(errors).mean()}


def test_the_loss_and_every_gradient_are_those_of_the_paper(batch):
    model = make()
    p = parameters(model)
    assert_same_losses_and_gradients(model, batch, expected(model, p, batch), p)


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (64, 8), (32, 8)])
def test_targets_are_blocks_and_the_context_a_block_without_them(size, patch):
    model = make(image_size=size, patch_size=patch)
    grid, N, position_B = model.config.grid, model.config.patches, torch.arange(100)
    masks = model.masks(position_B)
    shares, corners = [], set()
    for b in range(100):
        count, blocks = int(masks.target_B[b]), masks.target_BJM[b]
        for target_M in blocks:
            row, column = target_M // grid, target_M % grid
            height, width = (int(axis.max() - axis.min()) + 1 for axis in (row, column))
            assert len(target_M[:count].unique()) == count == height * width  # all of a rectangle
            corners.add((int(row.min()), int(column.min())))
        shares.append(count / N)
        context_K = masks.context_BK[b, : masks.context_B[b]]
        assert len(context_K.unique()) == len(context_K) <= N // 2
        assert not set(context_K.tolist()) & set(blocks.flatten().tolist())
    assert torch.tensor(shares).mean().item() == pytest.approx(0.175, rel=0.15)
    assert (0, 0) in corners and len(corners) > grid
    again = model.masks(position_B[3::20])
    assert all(torch.equal(one, many[3::20]) for one, many in zip(again, masks, strict=True))


def test_a_context_that_is_not_cut_is_its_block_less_the_targets():
    model = make(image_size=224, patch_size=16)
    masks, sides = model.masks(torch.arange(100)), set()
    for b in torch.nonzero(masks.context_B < 98)[:, 0].tolist():
        context = set(masks.context_BK[b, : masks.context_B[b]].tolist())
        outside = set(range(196)) - context - set(masks.target_BJM[b].flatten().tolist())
        top, left = (min(axis) for axis in zip(*(divmod(one, 14) for one in context), strict=True))
        bottom, right = (max(axis) for axis in zip(*(divmod(one, 14) for one in context), strict=True))
        assert not any(top <= one // 14 <= bottom and left <= one % 14 <= right for one in outside)
        sides.add(max(bottom - top, right - left) + 1)
    assert max(sides) == 14 and min(sides) >= 8


def test_losses_are_the_same_for_one_micro_batch_and_several(batch):
    model = make()
    assert model.counts(batch) == {"latents": 4 * int(model.masks(batch["position"]).target_B.sum())}
    assert_micro_batches_add_up(model, batch, [[2], [0, 3], [1]])


def test_the_context_encoder_sees_nothing_of_the_blocks(batch):
    model = make()
    masks = model.masks(batch["position"])
    image = batch["image"].clone()
    for b, target in enumerate(masks.target_BJM.flatten(1).tolist()):
        for row, column in (divmod(one, 6) for one in target):
            image[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
    seen = [model.context_encoder(one, masks.context_BK, keys_B=1 + masks.context_B) for one in (batch["image"], image)]
    for b, count in enumerate(1 + masks.context_B):
        assert torch.equal(seen[0][b, :count], seen[1][b, :count])
    assert model(batch | {"image": image})[0]["latents"] != model(batch)[0]["latents"]  # the teacher sees them


def test_the_encoder_that_is_evaluated_follows_the_one_that_is_trained():
    model = make()
    names = student_names(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(names.values()) == {name for name in trained if name.startswith("context_encoder.")}
    assert all(name == student.removeprefix("context_") for name, student in names.items())
    assert [model.momentum_at(progress) for progress in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    other = make(depth=2).encoder
    model.adopt(other)
    for encoder in (model.encoder, model.context_encoder):
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True))


def test_std_tells_a_collapsed_encoder(batch):
    model = make()
    assert model(batch)[1]["std/latents"] > 0.1
    with torch.no_grad():
        model.encoder.norm.weight.zero_()
    assert model(batch)[1]["std/latents"].item() == pytest.approx(0.0, abs=1e-6)


def test_flops_are_those_that_pytorch_counts_without_padding(batch):
    model = make()
    masks, total = model.masks(batch["position"]), 0
    for b, count in enumerate(masks.target_B):
        context_K = masks.context_BK[b : b + 1, : masks.context_B[b]]
        alone = masks._replace(
            context_BK=context_K,
            context_B=masks.context_B[b : b + 1],
            target_BJM=masks.target_BJM[b : b + 1, :, :count],
            target_B=masks.target_B[b : b + 1],
        )
        image = batch["image"][b : b + 1]
        with counted_flops() as counter:
            model.predictor(model.context_encoder(image, context_K), alone)
        total += 3 * counter.get_total_flops()
        with counted_flops() as counter:
            model.encoder(image)
        total += counter.get_total_flops()
    assert model.flops(batch) == pytest.approx(total, rel=1e-9)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ModelConfigError, match="no rest to predict"):
        resolve(IJEPAConfig(**SIZES | {"patch_size": 48}))
    with pytest.raises(ModelConfigError, match=r"model\.momentum must lie between 0 and 1"):
        resolve(IJEPAConfig(**SIZES | {"momentum": 1.0}))
    with pytest.raises(ModelConfigError, match=r"predictor_width 36 is not a multiple of model\.heads 8"):
        resolve(IJEPAConfig(**SIZES | {"predictor_width": 36, "heads": 8}))
