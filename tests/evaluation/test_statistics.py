"""The intervals cover what they say, pairs are kept together, and a seed fixes everything."""

import numpy as np
import pytest

from src.evaluation import statistics
from src.evaluation.statistics import Estimate, bootstrap, excludes_zero

ONES = np.ones


def test_the_value_is_the_ratio_of_sums():
    """Two rows of 1 and 9 tokens: the mean per token is not the mean of the rows' means."""
    estimate = bootstrap(np.array([1.0, 0.0]), None, np.array([1, 9]), seed=0)
    assert estimate.value == pytest.approx(0.1)
    # a resample is row 0 twice, row 1 twice, or one of each: means 1, 0 and 0.1
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_a_difference_is_per_token_too():
    a, b, tokens = np.array([3.0, 8.0, 1.0]), np.array([1.0, 2.0, 3.0]), np.array([10, 20, 70])
    assert bootstrap(a, b, tokens, 0).value == pytest.approx((12 - 6) / 100)


def test_identical_arms_differ_by_exactly_nothing():
    sums = np.random.default_rng(1).exponential(size=50)
    estimate = bootstrap(sums, sums.copy(), np.arange(1, 51), 3)
    assert estimate == Estimate(0.0, 0.0, 0.0)
    assert not excludes_zero(estimate)


def test_a_constant_difference_has_an_interval_of_no_width():
    """Pairs are drawn together: rows that differ wildly among themselves but by 2 between arms leave no doubt."""
    sums = np.random.default_rng(1).normal(0, 1000, 40).round()
    estimate = bootstrap(sums + 2, sums, ONES(40), 0)
    assert estimate == pytest.approx((2.0, 2.0, 2.0))
    assert excludes_zero(estimate)


def test_swapping_the_arms_turns_the_sign():
    generator = np.random.default_rng(5)
    a, b, tokens = generator.normal(size=30), generator.normal(size=30), generator.integers(1, 9, 30)
    one, other = bootstrap(a, b, tokens, 7), bootstrap(b, a, tokens, 7)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly():
    sums = np.random.default_rng(2).normal(1, 1, 60)
    one = bootstrap(sums, None, ONES(60), 42)
    assert one == bootstrap(sums, None, ONES(60), 42)
    other = bootstrap(sums, None, ONES(60), 43)
    assert other.value == one.value
    assert other != one
    assert other == pytest.approx(one, abs=0.02)


def test_cutting_the_draws_into_parts_is_of_no_account(monkeypatch):
    """Large samples are drawn in parts, to save memory; the interval is near the normal one all the same."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    sums = np.random.default_rng(3).normal(0, 1, 5000)
    estimate = bootstrap(sums, None, ONES(5000), 0)
    half = 1.96 * sums.std() / np.sqrt(5000)
    assert (estimate.low, estimate.high) == pytest.approx((sums.mean() - half, sums.mean() + half), abs=0.1 * half)


def test_one_row_has_no_width():
    assert bootstrap(np.array([3.0]), None, np.array([2]), 0) == Estimate(1.5, 1.5, 1.5)


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_covers_the_truth_in_95_of_100_samples(monkeypatch, paired):
    """200 simulated evaluations of 60 rows with 5 to 50 tokens each; a percentile interval is a little too narrow."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    generator = np.random.default_rng(0)
    truth, hits = (0.3 if paired else 0.8), 0
    for repetition in range(200):
        tokens = generator.integers(5, 50, 60)
        row_effect = generator.normal(0, 5, 60)  # shared by both arms: pairing must remove it
        a = tokens * (0.8 + generator.normal(0, 0.5, 60)) + row_effect * paired
        b = tokens * (0.5 + generator.normal(0, 0.5, 60)) + row_effect if paired else None
        estimate = bootstrap(a, b, tokens, repetition)
        hits += estimate.low <= truth <= estimate.high
    assert 0.90 <= hits / 200 <= 0.985


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.3, True), (-0.3, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (-0.1, 0.0, False)],
)
def test_an_interval_that_touches_0_shows_nothing(low, high, expected):
    assert excludes_zero(Estimate(0.0, low, high)) is expected
