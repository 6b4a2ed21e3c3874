"""Contrastive losses over ranks: open_clip's loss in one process is the oracle, by value and by every gradient."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_gloo_ranks

from mug.kernels.linear_cross_entropy import linear_cross_entropy
from mug.model.contrastive import LogitScale, contrastive_loss, gather, pair_loss, sigmoid_loss, two_view_loss

M, E = 16, 12  # samples on all ranks together, width


def embeddings() -> list[torch.Tensor]:
    """Images and texts, fp32 [M, E] of unit length, text somewhat like its image; they take gradients."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(M, E, generator=generator)
    text = image + torch.randn(M, E, generator=generator)
    return [torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in (image, text)]


@pytest.fixture(scope="module")
def clip_loss():
    from open_clip.loss import ClipLoss  # slow to import: not on every rank

    return ClipLoss()


def mine() -> slice:
    """The rows of this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * M // world, (rank + 1) * M // world)


def assert_means_over_ranks(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float) -> None:
    """The means over ranks, as the engine takes them, are the expected ones."""
    for tensor in found:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


def assert_is_the_oracle(expected: list[torch.Tensor]) -> None:
    image, text = embeddings()
    scale = torch.tensor([14.0], requires_grad=True)
    loss, accuracy = pair_loss(image[mine()], text[mine()], scale)
    loss.backward()
    found = [loss.detach(), accuracy, image.grad, text.grad, scale.grad]
    assert_means_over_ranks(found, expected, 1e-7)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradients_are_open_clips_at_any_number_of_ranks(world, clip_loss):
    image, text = embeddings()
    scale = torch.tensor([14.0], requires_grad=True)
    loss = clip_loss(image, text, scale)
    loss.backward()
    cosines = (image @ text.T).detach()
    hits = [(cosines.argmax(dim) == torch.arange(M)).float().mean() for dim in (0, 1)]
    run_gloo_ranks(world, assert_is_the_oracle, [loss.detach(), sum(hits) / 2, image.grad, text.grad, scale.grad])


def test_without_a_process_group_the_rows_at_hand_are_all(clip_loss):
    image, text = embeddings()
    torch.testing.assert_close(pair_loss(image, text, 14.0)[0], clip_loss(image, text, 14.0))


@pytest.mark.parametrize("budget", [None, 2**9], ids=["at once", "in chunks"])
def test_rows_that_are_not_valid_are_as_if_absent(budget, monkeypatch):
    if budget:
        monkeypatch.setitem(linear_cross_entropy.__kwdefaults__, "memory_budget", budget)
    valid = torch.ones(M, dtype=torch.bool)
    valid[[2, 3, 11]] = False
    image, text = embeddings()
    loss, accuracy = pair_loss(image, text, torch.tensor([100.0]), valid)
    loss.backward()
    others = [x.detach()[valid].requires_grad_() for x in (image, text)]
    true, true_accuracy = pair_loss(*others, 100.0)
    true.backward()
    torch.testing.assert_close(loss, true)
    torch.testing.assert_close(accuracy, true_accuracy)
    for found, expected in zip((image, text), others, strict=True):
        torch.testing.assert_close(found.grad[valid], expected.grad, rtol=1e-5, atol=1e-6)
        assert not found.grad[~valid].any()


def assert_ranks_without_rows_give_nothing() -> None:
    """Rank 1 does not hold a valid row: its loss is 0, and rank 0's is that of its own rows alone."""
    rank = dist.get_rank()
    image, text = (x[:8] if rank == 0 else x[8:] for x in embeddings())
    loss, accuracy = contrastive_loss(image, text, 5.0, torch.full((8,), rank == 0))
    gradient = torch.autograd.grad(loss, text)[0]  # a collective call
    if rank == 0:
        cosines = embeddings()[0][:8] @ embeddings()[1][:8].T
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(5 * cosines, torch.arange(8)))
        assert gradient.abs().sum() > 0
    else:
        assert loss == 0 and accuracy == 0 and not gradient.any()


def test_a_rank_without_a_valid_row():
    run_gloo_ranks(2, assert_ranks_without_rows_give_nothing)


def assert_gather_sums_gradients() -> None:
    rank = dist.get_rank()
    x = torch.arange(6.0).view(3, 2).add(10 * rank).double().requires_grad_()
    gathered = gather(x)
    assert gathered.tolist() == [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13], [14, 15]]
    (gathered * torch.arange(6)[:, None] * (1 + rank)).sum().backward()
    assert x.grad.tolist() == [[3.0 * (3 * rank + i)] * 2 for i in range(3)]  # weights 1 and 2, of the two ranks


def test_a_gathered_row_gets_the_gradients_of_all_ranks():
    run_gloo_ranks(2, assert_gather_sums_gradients)


def test_bf16_embeddings_are_compared_in_fp32(clip_loss):
    image, text = (x.detach().bfloat16() for x in embeddings())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = pair_loss(image, text, 100.0)
    torch.testing.assert_close(loss, clip_loss(image.float(), text.float(), 100.0))


# --- Two views ---------------------------------------------------------------------------------------------


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, view by view."""
    views, losses, hits = torch.cat([first, second]), [], []
    for i, view in enumerate(views):
        others = [j for j in range(2 * M) if j != i]
        logits = views[others] @ view / temperature
        own = others.index((i + M) % (2 * M))
        losses.append(logits.logsumexp(0) - logits[own])
        hits.append(float(logits.argmax() == own))
    return torch.stack(losses).mean(), torch.tensor(hits).mean()


def assert_is_nt_xent(expected: list[torch.Tensor]) -> None:
    for budget in (2**20, 3 * 8 * M):  # at once; three rows at a time
        first, second = embeddings()
        loss, accuracy = two_view_loss(first[mine()], second[mine()], 0.2, budget)
        loss.backward()
        found = [loss.detach(), accuracy, first.grad, second.grad]
        assert_means_over_ranks(found, expected, 1e-7)


@pytest.mark.parametrize("world", [1, 2])
def test_two_views_are_nt_xent_at_any_number_of_ranks(world):
    first, second = embeddings()
    loss, accuracy = nt_xent(first, second, 0.2)
    loss.backward()
    assert 0 < accuracy < 1
    run_gloo_ranks(world, assert_is_nt_xent, [loss.detach(), accuracy, first.grad, second.grad])


# --- All pairs ---------------------------------------------------------------------------------------------


def assert_is_siglips(expected: list[torch.Tensor]) -> None:
    for budget in (2**20, 3 * 16 * M):  # at once; three rows at a time
        image, text = embeddings()
        scale, bias = (torch.tensor([value], requires_grad=True) for value in (10.0, -3.0))
        loss, accuracy = sigmoid_loss(image[mine()], text[mine()], scale, bias, memory_budget=budget)
        loss.backward()
        found = [loss.detach(), accuracy, image.grad, text.grad, scale.grad, bias.grad]
        assert_means_over_ranks(found, expected, 1e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_pairs_are_open_clips_siglip_at_any_number_of_ranks(world):
    from open_clip.loss import SigLipLoss

    image, text = embeddings()
    scale, bias = (torch.tensor([value], requires_grad=True) for value in (10.0, -3.0))
    loss = SigLipLoss()(image, text, scale, bias)
    loss.backward()
    hits = ((image @ text.T).argmax(1) == torch.arange(M)).float().mean()
    assert 0 < hits < 1
    run_gloo_ranks(
        world, assert_is_siglips, [loss.detach(), hits, image.grad, text.grad, scale.grad.clone(), bias.grad.clone()]
    )


def test_pairs_of_rows_that_are_not_valid_do_not_count():
    valid = torch.ones(M, dtype=torch.bool)
    valid[[2, 3, 11]] = False
    image, text = embeddings()
    found = sigmoid_loss(image, text, 10.0, -3.0, valid)
    torch.testing.assert_close(found, sigmoid_loss(image[valid], text[valid], 10.0, -3.0))
    for gradient in torch.autograd.grad(found[0], (image, text)):
        assert gradient[valid].all() and not gradient[~valid].any()
    assert sigmoid_loss(image, text, 10.0, -3.0, torch.zeros(M, dtype=torch.bool)) == (0, 0)


# --- The scale ----------------------------------------------------------------------------------------------


def test_the_scale_begins_at_clips_temperature():
    scale = LogitScale()
    assert scale().item() == pytest.approx(14.2857, abs=1e-3) and scale.log_scale.shape == (1,)


@pytest.mark.parametrize("start", [100.0, 130.0])
def test_the_scale_stays_at_its_maximum_and_comes_back_at_once(start):
    """`.data.clamp_()` under ZeRO lets the fp32 copy grow; here the parameter stays, and one step back moves it."""
    scale = LogitScale(start)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1e-4)
    for sign in (-1, -1, -1, 1):
        optimizer.zero_grad()
        before = scale.log_scale.item()
        value = scale()
        assert value.item() == pytest.approx(100, rel=1e-5)
        (sign * value).sum().backward()
        optimizer.step()
        assert scale.log_scale.item() == pytest.approx(before - (0.01 if sign == 1 else 0), abs=1e-6)
    assert scale().item() == pytest.approx(100 * min(1.0, start / 100 * math.exp(-0.01)), rel=1e-4)


def assert_the_mean_gradient_is_cut() -> None:
    """-1 on rank 0 would be cut and 3 on rank 1 would not: 1.5 in the mean. Together they are 1, and pass."""
    scale = LogitScale(100.0)
    ((-1.0, 3.0)[dist.get_rank()] * scale().log()).sum().backward()
    assert scale.log_scale.grad.item() == pytest.approx(1.0)


def test_the_scales_gradient_is_cut_after_it_is_averaged():
    run_gloo_ranks(2, assert_the_mean_gradient_is_cut)
