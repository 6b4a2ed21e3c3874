"""What must hold for every objective that is found: which parameters decay, and that all of them learn."""

import pytest
import test_curves
import torch
from torch import nn

from mug.data.kinds.samples import Batch
from mug.model.objectives.objective import Context, Objective, objective_names
from mug.model.presets import Vocabulary
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "heads": 2, "depth": 4, "drop_path": 0.0}
SIZES |= {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "text_width": 16, "text_heads": 2, "text_length": 8}
SIZES |= {"text_unimodal_layers": 1, "text_cross_layers": 1, "text_layers": 1, "embedding_width": 8, "channels": 8}
SIZES |= {"projector_width": 16, "projection_width": 8, "predictor_width": 8, "image_queries": 4}
CONTEXT = Context(seed=3, vocabulary=Vocabulary(30, pad=0, bos=1, eos=2, mask=3), class_names=("a", "b", "c"))
BATCH = 8
MATRICES = (nn.Linear, nn.Conv2d, nn.Embedding)


def make(name: str) -> Objective:
    return test_curves.make(name, SIZES, CONTEXT)


def batch_for(model: Objective, step: int, kind: str) -> Batch:
    """What a kind of batch holds, of random images and captions; the last sample has none."""
    generator = torch.manual_seed(step)
    random = {"generator": generator, "dtype": torch.uint8}
    tokens = torch.randint(4, 30, (BATCH, 6), generator=generator)
    tokens[:, 0], tokens[:, -1] = 1, 2
    tokens[-1] = 0
    batch = {"tokens": tokens, "position": torch.arange(BATCH) + step * BATCH}
    if views := len(model.views(model.config)):
        batch["views"] = torch.randint(0, 256, (BATCH, views, 3, 16, 16), **random)
    else:
        batch["image"] = torch.randint(0, 256, (BATCH, 3, 16, 16), **random)
    batch["target"] = nn.functional.one_hot(torch.randint(0, 3, (BATCH,), generator=generator), 3).float()
    batch["labels"] = torch.randint(0, 3, (BATCH, 16, 16), generator=generator)
    batch["label"] = torch.randint(0, 3, (BATCH,), generator=generator)
    return Batch(kind, batch | ({"source": tokens, "target": tokens} if "bitext" in kind else {}))


@pytest.mark.parametrize("name", objective_names())
def test_only_matrices_decay(name):
    """Not scales, biases, norms, tokens, queries and positions."""
    model = make(name)
    modules = dict(model.named_modules())
    groups = parameter_groups(model, TrainerConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    learned = {of: p for of, p in model.named_parameters() if p.requires_grad}
    assert len(decay) == len(learned)
    frozen = tuple(f"{part}." for part in getattr(model, "frozen", ()))
    for of, parameter in learned.items():
        module, _, attribute = of.rpartition(".")
        # The image's patches and the words to predict have matrices of their own: PatchProjection, CaptionHead.
        matrix = attribute == "weight" and (isinstance(modules[module], MATRICES) or parameter.ndim > 1)
        assert decay[id(parameter)] == (0.1 if matrix and not of.startswith(frozen) else 0), of


@pytest.mark.parametrize("name", objective_names())
def test_every_parameter_moves_in_two_steps(name):
    model = make(name).train()
    frozen = tuple(f"{part}." for part in getattr(model, "frozen", ()))
    learned = {of: p for of, p in model.named_parameters() if p.requires_grad and not of.startswith(frozen)}
    before = {of: p.detach().clone() for of, p in learned.items()}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-3, weight_decay=0.0)
    for step in range(2):
        names = set()
        optimizer.zero_grad()
        for kind in model.kinds:
            batch = batch_for(model, step, kind)
            losses, _ = model(batch)
            assert losses.keys() == model.counts(batch).keys()
            assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
            sum(losses.values()).backward()
            names |= losses.keys()
        assert names == set(model.active)
        optimizer.step()
        model.after_step((step + 1) * BATCH)
    still = [of for of, p in learned.items() if torch.equal(p, before[of])]
    assert not still
