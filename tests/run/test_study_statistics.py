"""The intervals of a study: against SciPy, and their coverage under a simulated null."""

import numpy as np
import pytest
from scipy import stats

from mug.run.studies.statistics import Difference, difference, image_error, separable


def test_the_interval_over_seeds_is_scipys():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(0.6, 0.01, 5), random.normal(0.59, 0.01, 5)
    found = difference(list(ours), list(theirs))
    for alpha in (0.05, 0.0125):
        expected = stats.ttest_rel(ours, theirs).confidence_interval(1 - alpha)
        half = found.half_width(alpha)
        assert (found.mean - half, found.mean + half) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_pairs_are_those_of_the_same_seed():
    assert difference([0.5, 0.7, 0.9], [0.4, 0.6]) == Difference(pytest.approx(0.1), 2, pytest.approx(0), 0.0)
    assert difference([0.5], [0.4]).half_width() is None


def test_the_bootstrap_over_images_is_scipys():
    """Each image a group of its own."""
    random = np.random.default_rng(1)
    value_M = random.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=400)
    ours = image_error([(value_M, [*map(str, range(400))])], draws=4_000)
    theirs = stats.bootstrap((value_M,), np.mean, n_resamples=4_000, rng=np.random.default_rng(2)).standard_error
    assert ours == pytest.approx(theirs, rel=0.05)


def test_images_of_one_thing_count_once():
    """Ten copies of each image hold no more than one: the error is that of a tenth of the images."""
    value_M = np.random.default_rng(3).normal(size=200)
    names = [*map(str, range(200))]
    single = image_error([(value_M, names)], draws=2_000)
    copied = image_error([(np.repeat(value_M, 10), np.repeat(names, 10))], draws=2_000)
    ignored = image_error([(np.repeat(value_M, 10), [*map(str, range(2_000))])], draws=2_000)
    assert copied == pytest.approx(single, rel=0.06) and ignored == pytest.approx(single / 10**0.5, rel=0.06)


def test_the_error_of_a_mean_over_tasks():
    value_M, names = np.random.default_rng(4).normal(size=300), [*map(str, range(300))]
    one, four = (image_error([(value_M, names)] * tasks, draws=4_000) for tasks in (1, 4))
    assert four == pytest.approx(one / 2, rel=0.06), "tasks are drawn independently"


def test_seeds_of_a_null_are_covered():
    """Both encoders have the same numbers and noise: 0 lies in the interval in 95% of 2,000 studies."""
    ours, theirs = np.random.default_rng(5).normal(0.6, 0.005, (2, 2_000, 5))
    found = [difference(list(a), list(b)) for a, b in zip(ours, theirs, strict=True)]
    covered = np.mean([abs(one.mean) <= one.half_width() for one in found])
    assert 0.93 <= covered <= 0.97


def test_test_images_of_a_null_are_covered():
    """Two encoders that differ in which images they have right, by thing, but not in how many: 100 things, 4 images."""
    random, names = np.random.default_rng(6), np.repeat(np.arange(100), 4).astype(str)
    covered = 0
    for _ in range(2_000):
        value_M = np.repeat(random.choice([-1.0, 0.0, 1.0], size=100), 4)
        covered += abs(value_M.mean()) <= 1.96 * image_error([(value_M, names)], draws=100)
    assert 0.93 <= covered / 2_000 <= 0.97


def test_both_sources_of_noise_add_as_squares():
    one = Difference(0.02, 5, 0.003, 0.004)
    expected = np.hypot(stats.t.ppf(0.975, 4) * 0.003, stats.norm.ppf(0.975) * 0.004)
    assert one.half_width() == pytest.approx(expected)


def test_holm_by_hand():
    """p-values 0.01, 0.04, 0.03 without noise of images: 0.01 < 0.05 / 3, then 0.03 > 0.05 / 2 ends it."""

    def of(p: float) -> Difference:
        return Difference(float(stats.t.ppf(1 - p / 2, 4)), 5, 1.0, 0.0)

    found = separable([of(0.01), of(0.04), of(0.03)])
    first, second = (pytest.approx(stats.t.ppf(1 - 0.05 / (2 * n), 4)) for n in (3, 2))
    assert found == [(first, True), (second, False), (second, False)]
    assert [clear for _, clear in separable([of(0.01), of(0.04), of(0.02)])] == [True, True, True]
    assert separable([Difference(0.3, 1, None, 0.001)]) == [(None, False)], "no claim from one seed"


def test_a_family_of_nulls_is_seldom_claimed():
    random = np.random.default_rng(7)
    claims = 0
    for _ in range(1_000):
        found = [difference(list(random.normal(size=5)), list(random.normal(size=5))) for _ in range(4)]
        claims += any(clear for _, clear in separable(found))
    assert claims / 1_000 < 0.065
