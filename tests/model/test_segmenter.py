"""UperNet on the encoder: maps against timm's, losses against plain ones, layers against mmsegmentation's numbers."""

import numpy as np
import pytest
import timm
import torch

from mug.model import interchange
from mug.model.encoder import Encoder
from mug.model.objectives.objective import Context
from mug.model.objectives.segment import FeaturePyramid, Segment, SegmentConfig
from mug.model.presets import ModelConfigError, resolve
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig

SIZES = {"preset": "tiny", "image_size": 32, "patch_size": 8, "width": 16, "heads": 2}


def make(depth: int = 8, drop_path: float = 0.0, classes: int = 5) -> Segment:
    config = resolve(SegmentConfig(depth=depth, channels=8, drop_path=drop_path, **SIZES))
    torch.manual_seed(0)
    return Segment(config, Context(seed=3, class_names=tuple(map(str, range(classes)))))


def batch_of(model: Segment, B: int = 2) -> dict[str, torch.Tensor]:
    random, size = torch.Generator().manual_seed(1), model.config.image_size
    labels = torch.randint(0, model.classes, (B, size, size), generator=random)
    labels[:, :10] = 255
    image = torch.randint(0, 256, (B, 3, size, size), generator=random, dtype=torch.uint8)
    return {"image": image, "labels": labels, "position": torch.arange(B)}


@torch.inference_mode()
def test_maps_are_timms_outputs_after_each_quarter(normalized):
    model = make().eval()
    image = batch_of(model)["image"]
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 8, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model("vit_base_patch16_224", **sizes).eval()
    state = interchange.to_timm(Encoder(model.config))
    mine = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    vit.load_state_dict({name: mine.get(name, value) for name, value in state.items()})
    expected = vit.get_intermediate_layers(normalized(image), n=[1, 3, 5, 7], reshape=True, norm=False)
    tapped = []
    model.pyramid.register_forward_pre_hook(lambda module, inputs: tapped.extend(inputs[0]))
    maps = model.maps(image)
    for ours, theirs in zip(tapped, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [tuple(x.shape) for x in maps] == [(2, 16, side, side) for side in (16, 8, 4, 2)]
    torch.testing.assert_close(maps[2], expected[2], rtol=1e-4, atol=1e-5)


def test_the_recipes_maps_are_a_quarter_to_a_thirty_second_of_512_px():
    with torch.device("meta"):
        maps = FeaturePyramid(768)([torch.empty(1, 768, 32, 32)] * 4)
    assert [tuple(x.shape[1:]) for x in maps] == [(768, 512 // s, 512 // s) for s in (4, 8, 16, 32)]


def test_losses_are_cross_entropies_of_the_pixels_that_count():
    model = make().eval()
    batch = batch_of(model)
    losses, report = model(batch)
    with torch.no_grad():
        logits = model.logits(batch["image"]).numpy().astype(np.float64)
    labels = batch["labels"].numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    b, y, x = np.nonzero(labels != 255)
    expected = -log_p[b, labels[b, y, x], y, x].mean()
    assert losses["segments"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["auxiliary"].item() != pytest.approx(expected, rel=1e-3)
    assert report["accuracy/segments"].item() == pytest.approx((logits.argmax(1) == labels)[b, y, x].mean())
    assert model.counts(batch) == {"segments": len(b), "auxiliary": len(b)}


def test_every_parameter_learns_and_a_batch_without_labels_teaches_nothing():
    model = make(drop_path=0.2)
    losses, _ = model(batch_of(model, B=8))
    (losses["segments"] + losses["auxiliary"]).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    losses, _ = model({**batch_of(model), "labels": torch.full((2, 32, 32), 255)})
    (losses["segments"] + losses["auxiliary"]).backward()
    assert losses["segments"] == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_what_is_left_out_is_fixed_by_seed_and_position():
    model, batch = make(drop_path=0.3), batch_of(make(), B=40)
    dropout = model.auxiliary.classifier[0]
    first, _ = model(batch)
    channels = dropout.keep_BD
    torch.manual_seed(123)
    again, _ = model(batch)
    other, _ = model({**batch, "position": batch["position"] + 1})
    assert first["segments"] == again["segments"] != other["segments"]
    assert first["auxiliary"] == again["auxiliary"] != other["auxiliary"]
    assert channels[1:].equal(dropout.keep_BD[:-1]), "position 1, wherever it stands in the batch"
    assert channels.double().mean() == pytest.approx(0.9, abs=0.01) and len(channels.unique(dim=0)) == 40


def test_layers_learn_at_the_rates_of_mmsegmentation():
    """Of 12 blocks and decay 0.65: 0.65^13 before the blocks, 0.65^12 to 0.65 in them, 1 after them."""
    model = make(depth=12)
    groups = parameter_groups(model, TrainerConfig(weight_decay=0.05, layer_decay=0.65))
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        outside = 13 if parts[0] == "encoder" else 0
        power = 12 - int(parts[2]) if name.startswith("encoder.blocks.") else outside
        group = of[id(parameter)]
        assert group["lr_scale"] == pytest.approx(0.65**power), name
        shrinks = parameter.ndim > 1 and parts[-1] not in ("cls_token", "positions_ND")
        assert group["weight_decay"] == (0.05 if shrinks else 0), name
    assert len(of) == len(list(model.parameters()))


def test_three_blocks_are_too_few():
    with pytest.raises(ModelConfigError, match=r"model\.depth must be at least 4, not 3"):
        make(depth=3)
