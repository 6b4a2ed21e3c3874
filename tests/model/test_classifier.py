"""The classifier against timm's ViT, and what is random in it."""

import dataclasses

import pytest
import timm
import torch
from noise import noisy
from torch import nn

from mug.model.encoder import Encoder
from mug.model.objectives.classify import Classify, ClassifyConfig
from mug.model.objectives.objective import Context
from mug.model.presets import resolve
from mug.model.stochastic_depth import DropPath, sample_drop_path

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2}
CLASSES = 7
MEAN, STD = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def classifier(pool: str, drop_path: float = 0.0) -> Classify:
    torch.manual_seed(0)
    config = resolve(ClassifyConfig(**SIZES, pool=pool, drop_path=drop_path))
    return noisy(Classify(config, Context(seed=5, class_names=tuple("abcdefg"))), alpha=0.1)


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    target = torch.rand(count, CLASSES, generator=generator)
    return {"image": image, "target": target / target.sum(1, keepdim=True), "position": torch.arange(count) + 100}


@pytest.mark.parametrize(("pool", "timm_pool"), [("mean", "avg"), ("cls", "token")])
def test_the_logits_are_those_of_timms_vit(pool, timm_pool):
    model = classifier(pool).eval()
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    theirs = timm.create_model("vit_base_patch16_224", num_classes=CLASSES, global_pool=timm_pool, **sizes).eval()
    state = dict(model.encoder.state_dict())
    positions_ND = state.pop("positions_ND")
    state["pos_embed"] = nn.functional.pad(positions_ND, (0, 0, 1, 0))[None]
    if pool == "mean":
        state |= {f"fc_{name}": state.pop(name) for name in ("norm.weight", "norm.bias")}
    state |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    theirs.load_state_dict(state)
    image = batch()["image"]
    expected = theirs((image / 255 - MEAN) / STD)
    assert expected.std() > 0.05
    assert (model.logits(image) - expected).abs().max() < 1e-5


def test_loss_and_accuracies():
    model, given = classifier("mean").eval(), batch()
    losses, report = model(given)
    logits = model.logits(given["image"])
    assert losses["class"].item() == pytest.approx(
        nn.functional.cross_entropy(logits, given["target"]).item(), rel=1e-5
    )
    ranks = [logits[i].argsort(descending=True).tolist().index(given["target"][i].argmax()) for i in range(6)]
    assert report["accuracy/class"].item() == pytest.approx(sum(rank < 1 for rank in ranks) / 6)
    assert report["accuracy5/class"].item() == pytest.approx(sum(rank < 5 for rank in ranks) / 6)
    assert model.counts(given) == {"class": 6}


def test_every_parameter_learns_positions_too():
    model = classifier("mean", drop_path=0.3).train()
    losses, _ = model(batch())
    losses["class"].backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still
    assert "encoder.positions_ND" in dict(model.named_parameters())


def test_dropped_branches_depend_on_seed_and_position_alone():
    model, given = classifier("mean", drop_path=0.5).train(), batch()
    whole = model(given)[0]["class"].item()
    model(given)  # nothing is carried over
    parts = [model({name: value[i : i + 2] for name, value in given.items()})[0]["class"].item() for i in (0, 2, 4)]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-5)
    moved = model({**given, "position": given["position"] + 1000})[0]["class"].item()
    assert moved != pytest.approx(whole, rel=1e-5)
    model.context = dataclasses.replace(model.context, seed=6)
    assert model(given)[0]["class"].item() != pytest.approx(whole, rel=1e-5)


def test_the_rate_rises_linearly_and_is_the_share_left_out():
    model = classifier("mean", drop_path=0.4).train()
    assert [drop.rate for drop in model.drops] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    sample_drop_path(model.drops, 5, torch.arange(20_000))
    assert model.drops[0].scale_B is model.drops[1].scale_B is None
    kept = {i: model.drops[i].scale_B > 0 for i in range(2, 6)}
    for i, kept_B in kept.items():
        assert kept_B.float().mean().item() == pytest.approx(1 - model.drops[i].rate, abs=0.02)
        assert model.drops[i].scale_B.mean().item() == pytest.approx(1, abs=0.05)
    together = (kept[4] & kept[5]).float().mean().item()
    assert together == pytest.approx(0.36, abs=0.02), "the branches of a block are left out independently"


def test_drop_path_scales_what_it_keeps():
    drop = DropPath(0.2).train()
    drop.scale_B = torch.tensor([1.25, 0])
    x = torch.ones(2, 3, 4)
    assert drop(x)[0].unique().tolist() == [1.25] and not drop(x)[1].any()
    assert torch.equal(drop.eval()(x), x)


@torch.inference_mode()
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_an_adopted_encoder_keeps_its_weights_and_pooled_by_mean_gets_a_fresh_norm(pool):
    model, theirs = classifier(pool), classifier(pool).encoder
    for parameter in theirs.parameters():
        parameter.add_(0.5)
    fresh = Classify(model.config, model.context)
    fresh.adopt(theirs)
    for name, parameter in fresh.encoder.named_parameters():
        if pool == "mean" and name.startswith("norm."):
            assert torch.equal(parameter, torch.full_like(parameter, name == "norm.weight")), name
        else:
            assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_an_encoder_with_computed_positions_is_adopted_with_them():
    model, plain = classifier("cls"), Encoder(resolve(ClassifyConfig(**SIZES)))
    model.adopt(plain)
    assert torch.equal(model.encoder.positions_ND, plain.positions_ND)
    assert isinstance(model.encoder.positions_ND, nn.Parameter)
