"""The caption head's product and loss against F.cross_entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from mug.kernels.linear_cross_entropy import linear_cross_entropy

PAD = 3


def example(N=17, D=12, V=29, ignored=(0, 4, 16)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    target = torch.randint(PAD + 1, V, (N,), generator=generator)
    target[list(ignored)] = PAD
    return hidden, weight, target


@pytest.mark.parametrize("ignored", [(), (0, 4, 16), tuple(range(16))], ids=["none", "some", "all but one"])
@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_loss_and_gradients(ignored, factor):
    hidden, weight, target = example(ignored=ignored)
    ours = [x.float().requires_grad_() for x in (hidden, weight)]
    loss, _ = linear_cross_entropy(*ours, target, ignore_index=PAD)
    hidden.requires_grad_(), weight.requires_grad_()
    expected = F.cross_entropy(hidden @ weight.T, target, ignore_index=PAD)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=2e-6)
    (loss * factor).backward()
    (expected * factor).backward()
    torch.testing.assert_close(ours[0].grad.double(), hidden.grad, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(ours[1].grad.double(), weight.grad, atol=1e-7, rtol=1e-5)
    assert (ours[0].grad[list(ignored)] == 0).all()


def test_accuracy_is_the_share_of_kept_rows_whose_largest_logit_is_the_target():
    weight = torch.eye(5)
    hidden = torch.eye(5)[[0, 1, 2, 4, 4, 1]]  # the largest logit of each row
    target = torch.tensor([0, 1, PAD, 4, 2, 0])
    loss, accuracy = linear_cross_entropy(hidden, weight.requires_grad_(), target, ignore_index=PAD)
    assert accuracy.item() == pytest.approx(3 / 5)
    assert accuracy.dtype == torch.float32 and loss.requires_grad and not accuracy.requires_grad


def test_without_a_kept_row_all_is_zero_and_gradients_are_there():
    hidden, weight, target = example()
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    loss, accuracy = linear_cross_entropy(hidden, weight, torch.full_like(target, PAD), ignore_index=PAD)
    loss.backward()
    assert loss.item() == 0 and accuracy.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_what_stands_in_an_ignored_row_does_not_matter():
    hidden, weight, target = example()
    before = linear_cross_entropy(hidden.float(), weight.float(), target, ignore_index=PAD)
    hidden[target == PAD] = torch.nan
    after = linear_cross_entropy(hidden.float(), weight.float(), target, ignore_index=PAD)
    assert before == after and before[0].isfinite()


def test_large_logits_stay_finite():
    loss, accuracy = linear_cross_entropy(torch.eye(4) * 1e4, torch.eye(4), torch.tensor([0, 1, 2, 0]), ignore_index=-1)
    assert loss.item() == pytest.approx(1e4 / 4) and accuracy.item() == 0.75


def test_nan_in_a_kept_row_reaches_the_loss():
    hidden, weight, target = example()
    hidden[1, 0] = torch.nan
    assert linear_cross_entropy(hidden, weight, target, ignore_index=PAD)[0].isnan()


def test_bfloat16_takes_the_softmax_in_fp32():
    hidden, weight, target = example()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    loss, _ = linear_cross_entropy(hidden, weight, target, ignore_index=PAD)
    expected = F.cross_entropy((hidden @ weight.T).double(), target, ignore_index=PAD)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    "hidden, weight, target, message",
    [((5, 4), (7, 4), 6, "hidden has 5 rows, target 6"), ((5, 4), (7, 3), 5, "hidden has width 4, weight 3")],
)
def test_shapes_that_disagree_are_named(hidden, weight, target, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(target, dtype=torch.long), ignore_index=-1
        )
