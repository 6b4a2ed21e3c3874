"""SLIP: CLIP's loss by open_clip on one view, SimCLR's in float64 on two, and CLIP itself without the latter."""

import pytest
import torch
from plain import ENCODER, VOCABULARY
from torch.nn.functional import normalize
from two_views import SIZES, assert_value_and_gradients, in_float64, nt_xent, tokens_of, unit, views_batch

from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.objectives.objective import Context
from mug.model.objectives.slip import SLIP, SLIPConfig
from mug.model.presets import ModelConfigError, resolve

TEXT = {"text_width": 32, "text_heads": 2, "text_layers": 2, "text_length": 8, "embedding_width": 16}
CLIPS = ENCODER | TEXT


def make(*losses: str) -> SLIP:
    torch.manual_seed(0)
    return SLIP(resolve(SLIPConfig(**SIZES, **TEXT)), Context(seed=3, vocabulary=VOCABULARY, losses=losses))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(4, 20, (12, 8), generator=torch.Generator().manual_seed(2))
    tokens[:, 0], tokens[:, 5], tokens[:, 6:] = 1, 2, 0
    return {**views_batch(views=3), "tokens": tokens}


def test_losses_and_every_gradient_are_those_of_both(batch):
    from open_clip.loss import ClipLoss

    model = make()

    def expected():
        image, *views = tokens_of(model, model.encoder, batch)
        embedding = normalize(image @ model.image_projection.weight.double().T, dim=1)
        contrastive = ClipLoss()(embedding, model.embed_text(batch["tokens"]).double(), model.scale().double())
        return contrastive + nt_xent(unit(in_float64(model.projector, torch.cat(views))), 0.1)

    losses, metrics = model(batch)
    assert set(losses) == {"contrastive", "views"}
    assert set(metrics) == {"accuracy/contrastive", "accuracy/views", "std/views", "rank/views"}
    assert_value_and_gradients(model, losses["contrastive"] + losses["views"], expected)


def test_without_views_it_is_clip(batch):
    model, clip = make("contrastive"), CLIP(resolve(CLIPConfig(**CLIPS)), Context(vocabulary=VOCABULARY))
    clip.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("projector.")})
    ours, its = model(batch), clip({**batch, "image": batch["views"][:, 0]})
    assert ours[0].keys() == its[0].keys() and torch.equal(ours[0]["contrastive"], its[0]["contrastive"])
    assert ours[1].keys() == its[1].keys()
    assert model.counts(batch) == clip.counts(batch) and model.flops(batch) == clip.flops(batch)


def test_without_captions_it_is_simclr(batch):
    model, both = make("views"), make()
    losses, _ = model(batch)
    assert set(losses) == {"views"}
    torch.testing.assert_close(losses["views"], both(batch)[0]["views"])
    assert model.counts(batch) == {"views": 12}
    assert both.flops(batch) == pytest.approx(model.flops(batch) + make("contrastive").flops(batch))


def test_samples_without_caption_count_in_the_views_alone(batch):
    batch["tokens"][3:5] = 0
    model = make()
    assert model.counts(batch) == {"contrastive": 10, "views": 12}
    kept = [i for i in range(12) if i not in (3, 4)]
    fewer = {name: tensor[kept] for name, tensor in batch.items()}
    torch.testing.assert_close(model(batch)[0]["contrastive"], model(fewer)[0]["contrastive"])


def test_the_captions_view_has_its_own_scale_and_no_colours():
    first, *others = SLIP.views(make().config)
    assert (first.crop_scale, first.flip, first.jitter, first.grey, first.blur) == ((0.5, 1.0), False, (0.0,) * 4, 0, 0)
    assert all(view.crop_scale == (0.08, 1.0) and view.flip and view.grey == 0.2 for view in others)
    with pytest.raises(ModelConfigError, match=r"model\.image_scale must be a min and a max"):
        resolve(SLIPConfig(image_scale=(0.5, 2.0)))
