"""Intervals cover what they say, tests err as seldom as they say, and a planted gain is found as often as they say."""

from math import comb

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from src.evaluation import statistics
from src.evaluation.statistics import (
    ALPHA,
    Estimate,
    difference,
    discordant,
    estimate,
    excludes_zero,
    holm,
    majority,
    mcnemar,
    mcnemar_power,
    minimum_detectable,
    pass_at_k,
    proportion,
    resample,
)


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def two_seeds(prompts: int, samples: int, gain: float, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`pairs` evaluations of one model under two seeds, the first with a gain: shares right `[pairs, prompts]` each.

    A prompt's chance of being right is Beta(1, 1) / 2 + 1/4: most prompts are undecided, some nearly certain.
    """
    generator = np.random.default_rng(seed)
    chance = 0.25 + 0.5 * generator.random((pairs, prompts))
    return tuple(generator.binomial(samples, chance + extra) / samples for extra in (gain, 0.0))


def test_a_mean_per_token_is_a_ratio_of_sums():
    """Rows of 1 and 9 tokens weigh by their tokens; a resample of the two gives 1, 0 or 0.1."""
    sums = resample([[1.0, 0.0], [1, 9]], seed=0)
    assert set(np.round(ratio(sums.resampled), 9)) == {0.0, 0.1, 1.0}
    assert estimate(sums, ratio) == pytest.approx((0.1, 0.0, 1.0))


def test_the_resamples_have_the_spread_of_the_mean():
    values = np.random.default_rng(3).normal(5, 2, 200)
    means = resample([values], 0).resampled[:, 0] / 200
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / np.sqrt(200), rel=0.03)


def test_the_columns_of_a_prompt_stay_together():
    values = np.random.default_rng(0).normal(size=30)
    resampled = resample([values, values + 1], 0).resampled
    assert resampled[:, 1] - resampled[:, 0] == pytest.approx(np.full(len(resampled), 30))


def test_order_is_of_no_account_and_the_seed_is():
    a, b = np.random.default_rng(1).random((2, 40))
    turned = difference(a[::-1], b[::-1], 7)
    assert turned == difference(a, b, 7)
    assert difference(a, b, 8) != turned
    assert difference(a, b, 8) == pytest.approx(turned, abs=0.02)


def test_many_prompts_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    values = np.random.default_rng(3).normal(0, 1, 9000)
    half = 1.96 * values.std() / np.sqrt(9000)
    found = difference(values, np.zeros(9000), 0)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_equal_arms_have_no_width_and_one_prompt_no_interval():
    assert difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], 0) == (0.0, 0.0, 0.0)
    assert difference([1.0], [0.0], 0) == (1.0, None, None)
    assert proportion([1.0], 4) == (1.0, None, None)
    assert not excludes_zero(difference([1.0], [0.0], 0))


def test_a_ratio_that_may_divide_by_nothing_has_no_interval():
    assert estimate(resample([[1.0, 1.0], [0.0, 1.0]], 0), ratio) == (2.0, None, None)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.3, True), (-0.3, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (-0.1, 0.0, False)],
)
def test_an_interval_that_touches_0_shows_nothing(low, high, expected):
    assert excludes_zero(Estimate(0.0, low, high)) is expected


@pytest.mark.parametrize(("prompts", "samples"), [(10, 4), (20, 1), (50, 1)])
def test_small_samples_are_covered(monkeypatch, prompts, samples):
    """The plain percentile interval misses in 7 to 8 of 100 where prompts are 10 and samples 4."""
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    pairs = zip(*two_seeds(prompts, samples, 0.1, 800, seed=prompts), strict=True)
    found = [difference(a, b, 0) for a, b in pairs]
    missed = sum(not e.low <= 0.1 <= e.high for e in found) / 800
    assert 0.02 <= missed <= 0.067


@pytest.mark.parametrize(
    ("shares", "samples", "expected"),
    [
        # Wilson with t(9) = 2.262 for the normal quantile, by hand: z^2 / (n + z^2)
        ([0.0] * 10, 1, (0.0, 0.0, 5.1174 / 15.1174)),
        ([1.0] * 10, 1, (1.0, 10 / 15.1174, 1.0)),
        # equal within every prompt: four samples are no better than one
        ([0.0] * 5 + [1.0] * 5, 4, proportion([0.0] * 5 + [1.0] * 5, 1)),
    ],
)
def test_a_proportion_has_a_wilson_interval(shares, samples, expected):
    assert proportion(shares, samples) == pytest.approx(expected, abs=1e-4)


def test_samples_narrow_a_proportion_where_prompts_are_alike():
    generator = np.random.default_rng(0)
    one, four = (proportion(generator.binomial(k, 0.5, 100) / k, k) for k in (1, 4))
    assert (one.high - one.low) / (four.high - four.low) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(("prompts", "samples", "shape"), [(10, 1, (1, 9)), (10, 4, (1, 1)), (50, 4, (1, 9))])
def test_a_proportion_covers_the_truth(prompts, samples, shape):
    generator = np.random.default_rng(2)
    draws = generator.binomial(samples, generator.beta(*shape, (1000, prompts))) / samples
    missed = sum(not e.low <= shape[0] / sum(shape) <= e.high for e in (proportion(d, samples) for d in draws))
    assert missed / 1000 <= 0.08


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (6, 0), (5, 0), (12, 3), (3, 12), (40, 41)])
def test_mcnemar_is_the_exact_binomial_test(won, lost):
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected)


def test_discordant_prompts_are_those_with_more_right_answers():
    assert discordant([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]) == (1, 1)
    assert discordant([0.5, 0.75, 0.25], [0.25, 0.25, 0.25]) == (2, 0)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.5], [1.0, 1.0]), ([0.02], [0.02]), ([], []),
     ([0.001, 0.2, 0.012, 0.012], [0.004, 0.2, 0.036, 0.036])],
)  # fmt: skip
def test_holm(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


@pytest.mark.parametrize(("prompts", "differing", "net"), [(10, 0.9, 0.9), (50, 0.3, 0.2), (350, 0.3, 0.05)])
def test_power_is_the_rate_in_simulated_evaluations(prompts, differing, net):
    generator = np.random.default_rng(0)
    counts = generator.binomial(prompts, differing, 20_000)
    won = generator.binomial(counts, (1 + net / differing) / 2)
    p_values = np.minimum(1, 2 * binom.cdf(np.minimum(won, counts - won), counts, 0.5))
    assert mcnemar_power(prompts, differing, net, ALPHA) == pytest.approx((p_values <= ALPHA).mean(), abs=0.012)


def test_too_few_prompts_can_show_nothing():
    """Five prompts, all won, have p = 0.0625; with six the test can call, though not where it is one of nine."""
    assert mcnemar_power(5, 1.0, 1.0, ALPHA) == 0
    assert minimum_detectable([0.0] * 5, [0.0] * 5, ALPHA) is None
    assert 0.9 < minimum_detectable([0.0] * 6, [0.0] * 6, ALPHA) < 1
    assert minimum_detectable([0.0] * 6, [0.0] * 6, ALPHA / 9) is None


def test_more_prompts_and_more_samples_show_less():
    """Four samples halve the size of a difference by chance, and with it the least one that can be shown."""
    found = {}
    for prompts, samples in ((100, 1), (400, 1), (400, 4)):
        a, b = two_seeds(prompts, samples, 0.0, 1, seed=5)
        found[prompts, samples] = minimum_detectable(a[0], b[0], ALPHA)
    assert found[100, 1] > 1.7 * found[400, 1]
    assert found[400, 1] > 1.3 * found[400, 4]


@pytest.mark.parametrize(("prompts", "samples"), [(350, 1), (350, 4), (50, 1)])
def test_one_model_under_two_seeds(prompts, samples, monkeypatch):
    """1,000 pairs without a difference: the interval excludes 0 in about 5 %, the exact test calls at most 5 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 10_000 if (prompts, samples) == (350, 1) else 2000)
    pairs = list(zip(*two_seeds(prompts, samples, 0.0, 1000, seed=prompts + samples), strict=True))
    assert 0.035 <= np.mean([excludes_zero(difference(a, b, 0)) for a, b in pairs]) <= 0.065
    assert np.mean([mcnemar(*discordant(a, b)) <= ALPHA for a, b in pairs]) <= 0.05


@pytest.mark.parametrize(("prompts", "samples"), [(350, 1), (1500, 1), (350, 4)])
def test_a_planted_gain_of_5_points_is_found_at_the_stated_power(prompts, samples):
    """Stated: the exact test's power for the shares of prompts that are won and lost in truth."""
    gain, chance, right = 0.05, np.linspace(0.25, 0.75, 2001)[:, None], np.arange(samples + 1)
    ours, theirs = (binom.pmf(right, samples, chance + extra) for extra in (gain, 0.0))
    joint = np.einsum("pi,pj->ij", ours, theirs) / len(chance)
    won, lost = np.tril(joint, -1).sum(), np.triu(joint, 1).sum()
    stated = mcnemar_power(prompts, won + lost, won - lost, ALPHA)
    pairs = zip(*two_seeds(prompts, samples, gain, 1000, seed=3), strict=True)
    found = np.mean([mcnemar(*discordant(a, b)) <= ALPHA for a, b in pairs])
    assert found == pytest.approx(stated, abs=0.04)
    assert {(350, 1): stated < 0.4, (1500, 1): stated > 0.75, (350, 4): stated > 0.5}[prompts, samples]


@pytest.mark.parametrize("samples", [1, 4])
def test_the_minimum_detectable_difference_is_found_in_80_of_100(samples):
    planned = minimum_detectable(*(side[0] for side in two_seeds(2000, samples, 0.0, 1, seed=1)), ALPHA)
    pairs = zip(*two_seeds(2000, samples, planned, 500, seed=2), strict=True)
    assert np.mean([mcnemar(*discordant(a, b)) <= ALPHA for a, b in pairs]) == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize(("answers", "right", "k"), [(4, 1, 1), (4, 1, 2), (8, 3, 4), (8, 0, 4), (8, 8, 1), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(answers, right, k):
    from itertools import combinations

    subsets = list(combinations([True] * right + [False] * (answers - right), k))
    assert pass_at_k(answers, right, k) == pytest.approx(sum(map(any, subsets)) / comb(answers, k))


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([("7", True), ("7.0", True), ("8", False)], 1.0),
        ([("7", True), ("8", False), ("8", False)], 0.0),
        ([("7", True), ("8", False)], 0.5),
        ([("1/2", True), ("0.5", True), ("3 1/2", False)], 1.0),
        ([], 0.0),
    ],
)
def test_majority(votes, expected):
    assert majority(votes) == expected
