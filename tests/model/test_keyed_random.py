"""Masks depend on (seed, position) alone, and are uniform."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mug.model.keyed_random import MASK, WORD_KIND, WORDS, random_bits, random_masking

GAMMA = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """SplitMix64's finaliser, in Python's own integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_the_oracle_is_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # from the state 1234567
    assert [mix((1234567 + i * GAMMA) % 2**64) for i in (1, 2, 3)] == published


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    purpose=st.integers(0, 255),
    positions=st.lists(st.integers(0, 2**50), min_size=1, max_size=4),
    count=st.integers(1, 9),
)
def test_random_bits_are_the_hash_in_64_bit_arithmetic(seed, purpose, positions, count):
    key = mix((seed * 256 + purpose) * GAMMA % 2**64)
    rows = [mix((position * GAMMA + key) % 2**64) for position in positions]
    expected = [[mix((row + i * GAMMA) % 2**64) >> 1 for i in range(1, count + 1)] for row in rows]
    assert random_bits(seed, purpose, torch.tensor(positions), count).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    positions=st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    patches=st.integers(2, 50),
    data=st.data(),
)
def test_a_mask_is_a_split_of_all_patches(seed, positions, patches, data):
    visible = data.draw(st.integers(1, patches - 1))
    seen, hidden = random_masking(seed, torch.tensor(positions), patches, visible)
    assert seen.shape == (len(positions), visible) and hidden.shape == (len(positions), patches - visible)
    both = torch.cat([seen, hidden], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(patches).expand(len(positions), -1))


def test_a_mask_does_not_depend_on_the_batch_it_is_in():
    positions = torch.tensor([0, 1, 17, 199_999_999, 2**40, 3])
    seen, hidden = random_masking(5, positions, 196, 49)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    turned_seen, turned_hidden = random_masking(5, positions[order], 196, 49)
    assert torch.equal(turned_seen, seen[order]) and torch.equal(turned_hidden, hidden[order])
    for b in range(6):
        alone = random_masking(5, positions[b : b + 1], 196, 49)
        assert torch.equal(alone[0][0], seen[b]) and torch.equal(alone[1][0], hidden[b])


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = random_masking(5, torch.arange(4), 16, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(random_masking(5, torch.arange(4), 16, 4)[0], first[0])


def overlap(a, b, patches):
    """Mean number of visible patches that two sets of masks share."""
    hot = [torch.zeros(len(x), patches).scatter_(1, x, 1) for x in (a, b)]
    return (hot[0] * hot[1]).sum(1).mean().item()


def test_other_seeds_and_positions_give_unrelated_masks():
    n, N, K = 4000, 196, 49
    position = torch.arange(n)
    seen = random_masking(3, position, N, K)[0]
    assert len(seen.sort(1).values.unique(dim=0)) == n
    expected = K * K / N
    deviation = (K * K / N * (1 - K / N) * (N - K) / (N - 1) / n) ** 0.5  # hypergeometric
    others = {
        "next seed": random_masking(4, position, N, K)[0],
        "next position": random_masking(3, position + 1, N, K)[0],
        "256 positions on": random_masking(3, position + 256, N, K)[0],
        "seed times 256": random_masking(3 * 256, position, N, K)[0],
        "far away": random_masking(3, position + 2**32, N, K)[0],
    }
    for name, other in others.items():
        assert abs(overlap(seen, other, N) - expected) < 4.5 * deviation, name


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_patch_is_equally_likely_at_every_place(seed):
    n, N = 12_800, 64
    order = torch.cat(random_masking(seed, torch.arange(n), N, 16), dim=1)
    counts = torch.stack([torch.bincount(place, minlength=N) for place in order.T]).double()  # [place, patch]
    chi_square = ((counts - n / N) ** 2 / (n / N)).sum(1)  # N - 1 degrees of freedom, each place
    freedom = N - 1
    assert abs(chi_square.mean() - freedom) < 4.5 * (2 * freedom / N) ** 0.5
    assert chi_square.min() > freedom - 4.5 * (2 * freedom) ** 0.5
    assert chi_square.max() < freedom + 5.5 * (2 * freedom) ** 0.5


def test_every_bit_of_the_hash_is_a_fair_coin_and_never_negative():
    draws = random_bits(9, MASK, torch.arange(2000), 50)
    assert draws.min() >= 0
    n = draws.numel()
    for bit in range(63):
        share = (draws >> bit & 1).double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / n**0.5, bit


def test_purposes_are_separate_streams():
    streams = [random_bits(1, purpose, torch.arange(100), 20).flatten() for purpose in (MASK, WORDS, WORD_KIND)]
    assert len(torch.cat(streams).unique()) == 3 * 2000
