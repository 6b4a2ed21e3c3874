"""UniX² over kinds of batch, ranks, accumulation and ZeRO stages: plain PyTorch with entire groups is the oracle.

Each step has two groups of different kinds, so each leaves parameters without gradient that the other uses.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_gloo_ranks
from test_curves import engine_of, weights_of

from mug.data.kinds.samples import Batch
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.objective import Context
from mug.model.objectives.unix2 import UniX2
from mug.model.presets import Vocabulary, resolve
from mug.run.cluster.coupled import held_out_losses, prepare
from mug.run.cluster.losses import WeightedMeans
from mug.run.training import step as training_step
from mug.run.training.step import train_step

SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "text_width": 16, "text_heads": 2}
SIZES |= {"text_length": 12, "text_layers": 2, "fusion_layers": 2, "decoder_layers": 2, "embedding_width": 8}
VOCABULARY = Vocabulary(30, pad=0, bos=1, eos=2, mask=3, languages=("en", "de"), language_ids=(4, 5))
STEPS = [("pairs", "bitext"), ("text", "image_bitext"), ("image_bitext", "pairs"), ("bitext", "text")]
GROUP, GROUPS, RATE = 8, 2, 0.05
CASES = {1: [(3, 2)], 2: [(0, 1), (1, 2), (3, 4)], 4: [(2, 2)]}  # ZeRO stage, accumulation


def make(negatives: str = "random") -> UniX2:
    torch.manual_seed(0)
    config = resolve(MultilingualConfig(**SIZES, itm_negatives=negatives))
    return UniX2(config, Context(seed=3, vocabulary=VOCABULARY))


def text_at(position: int, target: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * position + target)
    words = torch.randint(6, 30, (1 + (position * 5 + target) % 9,), generator=generator).tolist()
    tokens = [5, *words, 2] if target else [1, *words, 2, 4]
    tokens = [] if position % 7 == 3 + target else tokens  # some lack one
    return torch.tensor(tokens + [0] * (SIZES["text_length"] - len(tokens)))


def batch_of(kind: str, positions: list[int]) -> Batch:
    tensors = {"position": torch.tensor(positions)}
    if kind in ("pairs", "image_bitext"):
        random = {"dtype": torch.uint8}
        images = [torch.randint(0, 256, (3, 16, 16), generator=torch.manual_seed(p), **random) for p in positions]
        tensors["image"] = torch.stack(images)
    source = torch.stack([text_at(position) for position in positions])
    if "bitext" not in kind:
        return Batch(kind, tensors | {"tokens": source})
    target = torch.stack([text_at(position, target=True) for position in positions])
    return Batch(kind, tensors | {"source": source, "target": target})


def positions_of(step: int, group: int) -> list[int]:
    first = (step * GROUPS + group) * GROUP
    return list(range(first, first + GROUP))


def drawn(model: UniX2, batch: Batch) -> Batch:
    """The batch with its hard negatives, if there are some."""
    if not model.draws(batch):
        return batch
    batch = model.prepare(batch)
    with torch.no_grad():
        batch.update(model.draw(model.features(batch)[0]))
    return batch


def oracle(negatives: str = "random") -> list[tuple[float, dict[str, np.ndarray]]]:
    """The total and the weights of each step."""
    model, found = make(negatives), []
    for step, kinds in enumerate(STEPS):
        batches = [batch_of(kind, positions_of(step, group)) for group, kind in enumerate(kinds)]
        losses = [model(drawn(model, batch))[0] for batch in batches]
        total = sum(sum(of_group.values()) for of_group in losses)  # no name is in both groups
        model.zero_grad()
        total.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0 if parameter.grad is None else RATE * parameter.grad
        found.append((total.item(), {name: p.detach().numpy().copy() for name, p in model.named_parameters()}))
    return found


def micro_batches(step: int, accumulation: int) -> list[Batch]:
    """Those of this rank, group after group: each R-th position."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for group, kind in enumerate(STEPS[step]):
        mine = positions_of(step, group)[rank::world]
        size = len(mine) // accumulation
        found += [batch_of(kind, mine[i : i + size]) for i in range(0, len(mine), size)]
    return found


def build(stage: int, accumulation: int, negatives: str = "random", rate: float = RATE, **zero: object):
    micro_batch = GROUP // (dist.get_world_size() * accumulation)
    optimizer = {"type": "SGD", "params": {"lr": rate}}
    return engine_of(make(negatives), micro_batch, GROUPS * accumulation, optimizer, stage, **zero)


def assert_is_the_oracle(
    cases: list[tuple[int, int]], expected: list[tuple[float, dict[str, np.ndarray]]], negatives: str = "random"
) -> None:
    for stage, accumulation in cases:
        engine = build(stage, accumulation, negatives)
        for step, (total, weights) in enumerate(expected):
            what = f"ZeRO {stage}, {dist.get_world_size()} rank(s), accumulation {accumulation}, step {step}"
            means = train_step(engine, micro_batches(step, accumulation), UniX2.losses, groups=GROUPS)
            assert means.reduce(UniX2.losses)["loss/total"] == pytest.approx(total, abs=2e-5), what
            for name, weight in weights_of(engine).items():
                torch.testing.assert_close(
                    weight, torch.from_numpy(weights[name]), rtol=1e-4, atol=2e-6, msg=what + name
                )


@pytest.mark.slow
@pytest.mark.parametrize("world", CASES)
def test_steps_are_those_of_entire_groups(world):
    run_gloo_ranks(world, assert_is_the_oracle, CASES[world], oracle())


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(1, (2, 1)), (2, (3, 2))])
def test_hard_negatives_are_those_of_entire_groups(world, case):
    run_gloo_ranks(world, assert_is_the_oracle, [case], oracle("hard")[:3], "hard")  # two steps with pairs


def test_hard_negatives_are_others_than_random_ones_and_stay_when_prepared_again():
    model, batch = make("hard"), batch_of("pairs", positions_of(0, 0))
    hard, random = model.prepare(drawn(model, batch)), model.prepare(batch)
    T = hard["texts"].shape[1]
    assert torch.equal(hard["texts"][:GROUP, :T], random["texts"][:GROUP, :T]), "CMCL's"
    assert not torch.equal(hard["texts"][GROUP : 2 * GROUP], random["texts"][GROUP : 2 * GROUP])
    assert model.prepare(hard) is hard and not model.draws(batch_of("text", positions_of(0, 0)))


# --- Gradients of a cycle of tasks, at rate 0 -----------------------------------------------------------------

CYCLE = STEPS[:3]  # a step leaves out parts that the one before has used: the decoder's memory of an image, CLCL's head
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ALL_STAGES = [(0, {}), (1, {}), (2, {}), (3, {}), (3, OFFLOAD)]


def true_gradients() -> list[dict[str, np.ndarray]]:
    """Of each step, by plain PyTorch, of weights that never move; 0 where a step does not use one."""
    model, found = make(), []
    for step, kinds in enumerate(CYCLE):
        model.zero_grad()
        for group, kind in enumerate(kinds):
            sum(model(batch_of(kind, positions_of(step, group)))[0].values()).backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        found.append({name: gradient.numpy().copy() for name, gradient in gradients.items()})
    return found


def gradients(stage: int, zero: dict[str, object]) -> Iterator[dict[str, torch.Tensor]]:
    """Of each step, as the engine's optimizer has them when it is called."""
    from deepspeed.utils import safe_get_full_grad

    engine, found, before = build(stage, 1, rate=0.0, **zero), {}, training_step.collect_gradients

    def collect(engine) -> None:
        before(engine)
        for name, parameter in engine.module.named_parameters():
            found[name] = safe_get_full_grad(parameter).clone()

    training_step.collect_gradients = collect
    for step in range(len(CYCLE)):
        train_step(engine, micro_batches(step, 1), UniX2.losses, groups=GROUPS)
        yield dict(found)
    training_step.collect_gradients = before


def assert_gradients(cases: list[tuple[int, dict]], expected: list[dict[str, np.ndarray]]) -> None:
    for stage, zero in cases:
        for step, (found, true) in enumerate(zip(gradients(stage, zero), expected, strict=True)):
            assert found.keys() == true.keys()
            for name, gradient in found.items():
                what = f"ZeRO {stage} {zero}, {dist.get_world_size()} rank(s), step {step}, {name}"
                oracle = torch.from_numpy(true[name])
                torch.testing.assert_close(gradient, oracle, rtol=1e-4, atol=2e-6, msg=lambda m, w=what: f"{w}: {m}")


def assert_wrong_without_the_guard(cases: list[tuple[int, dict]], expected: list[dict[str, np.ndarray]]) -> None:
    training_step.clear_gradients = lambda engine: None
    for case in cases:
        with pytest.raises(AssertionError, match=r"ZeRO 3 .*, step [12], "):
            assert_gradients([case], expected)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_gradients_of_a_cycle_of_tasks_are_the_same_in_every_stage(world):
    run_gloo_ranks(world, assert_gradients, ALL_STAGES, true_gradients())


@pytest.mark.slow
def test_deepspeed_alone_adds_gradients_of_the_step_before():
    """When this fails, DeepSpeed clears them itself, and mug.run.training.stale_gradients can go."""
    run_gloo_ranks(1, assert_wrong_without_the_guard, ALL_STAGES[3:], true_gradients())


def assert_held_out_losses(expected: dict[str, float]) -> None:
    model, means = make(), WeightedMeans()
    mine = positions_of(0, 0)[dist.get_rank() :: dist.get_world_size()]
    batches = prepare(model, [batch_of("pairs", mine[:1]), batch_of("pairs", mine[1:])])
    for outcome in held_out_losses(model, [(batch, model.counts(batch)) for batch in batches]):
        means.add(*outcome)
    found = means.reduce(UniX2.losses)
    assert {name: found[f"loss/{name}"] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_held_out_losses_are_those_of_the_entire_group():
    with torch.no_grad():
        losses, _ = make()(batch_of("pairs", positions_of(0, 0)))
    run_gloo_ranks(2, assert_held_out_losses, {name: loss.item() for name, loss in losses.items()})


def test_without_the_group_other_texts_are_drawn():
    """The exchange is what makes the curve independent of ranks."""
    model, positions = make(), positions_of(0, 0)
    entire = model.prepare(batch_of("pairs", positions))
    half = model.prepare(batch_of("pairs", positions[:4]))
    assert not torch.equal(entire["texts"][GROUP : GROUP + 4], half["texts"][4:8])
    assert model.shared(batch_of("pairs", positions)) == ("tokens", "position")
    assert model.shared(batch_of("text", positions)) == model.shared(entire) == ()
