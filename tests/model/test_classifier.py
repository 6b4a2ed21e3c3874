"""The classifier against timm's ViT, and what is random in it."""

import pytest
import timm
import torch
from torch import nn

from mug.model.classifier import Classifier, DropPath, layer_of
from mug.model.encoder import Encoder
from mug.model.presets import ModelConfig, resolve

CONFIG = resolve(ModelConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2))
CLASSES = 7
MEAN, STD = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def classifier(pool: str, drop_path: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(Encoder(CONFIG), CONFIG, CLASSES, pool, drop_path, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


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
    norm = "fc_norm" if pool == "mean" else "norm"
    weights = (model.norm if pool == "mean" else model.encoder.norm).state_dict()
    state |= {f"{norm}.{name}": value for name, value in weights.items()}
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
    model.seed = 6
    assert model(given)[0]["class"].item() != pytest.approx(whole, rel=1e-5)


def test_the_rate_rises_linearly_and_is_the_share_left_out():
    model = classifier("mean", drop_path=0.4).train()
    assert [drop.rate for drop in model.drops] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    model._choose_paths(torch.arange(20_000))
    for drop in model.drops:
        assert drop.keep_B.float().mean().item() == pytest.approx(1 - drop.rate, abs=0.02)
    together = (model.drops[4].keep_B & model.drops[5].keep_B).float().mean().item()
    assert together == pytest.approx(0.36, abs=0.02), "the branches of a block are left out independently"


def test_drop_path_scales_what_it_keeps():
    drop = DropPath(0.2).train()
    drop.keep_B = torch.tensor([True, False])
    x = torch.ones(2, 3, 4)
    assert drop(x)[0].unique().tolist() == [1.25] and not drop(x)[1].any()
    assert torch.equal(drop.eval()(x), x)


def test_layers_are_numbered_from_the_patches_to_the_head():
    numbers = {name: layer_of(name, 12) for name in ("encoder.cls_token", "encoder.patch_embed.proj.weight")}
    assert set(numbers.values()) == {0}
    assert layer_of("encoder.blocks.0.norm1.weight", 12) == 1 and layer_of("encoder.blocks.11.mlp.fc2.bias", 12) == 12
    assert layer_of("head.weight", 12) == layer_of("norm.bias", 12) == layer_of("encoder.norm.weight", 12) == 13
