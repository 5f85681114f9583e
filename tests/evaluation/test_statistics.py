"""Intervals cover what they say, tests err as seldom as they say, and a planted gain is found as often as they say."""

from dataclasses import astuple
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm, t, ttest_1samp

from src.evaluation import statistics
from src.evaluation.statistics import (
    ALPHA,
    Crossed,
    Estimate,
    by_family,
    crossed,
    difference,
    discordant,
    estimate,
    excludes_zero,
    holm,
    majority,
    mcnemar_power,
    minimum_detectable,
    pass_at_k,
    proportion,
    resample,
    sign_flip,
    smallest_p,
)


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def alone(prompts):
    """Every prompt a family of its own."""
    return list(range(prompts))


def rejected(arms: tuple[np.ndarray, np.ndarray], samples: int, families) -> float:
    """In which share of evaluations, shares right `[pairs, prompts]` of two arms, the exact test calls a difference."""
    nets = np.rint((arms[0] - arms[1]) * samples).astype(int)
    return np.mean([sign_flip(by_family(net, families)) <= ALPHA for net in nets])


def rejected_by_mcnemar(arms: tuple[np.ndarray, np.ndarray]) -> float:
    counts = [discordant(a, b) for a, b in zip(*arms, strict=True)]
    return np.mean([binomtest(won, won + lost).pvalue <= ALPHA for won, lost in counts if won + lost])


def two_seeds(prompts: int, samples: int, gain: float, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`pairs` evaluations of one model under two seeds, the first with a gain: shares right `[pairs, prompts]` each.

    A prompt's chance of being right is Beta(1, 1) / 2 + 1/4: most prompts are undecided, some nearly certain.
    """
    generator = np.random.default_rng(seed)
    chance = 0.25 + 0.5 * generator.random((pairs, prompts))
    return tuple(generator.binomial(samples, chance + extra) / samples for extra in (gain, 0.0))


def scenario_families(
    families: int, prompts: int, spread: float, gain: float, pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`pairs` evaluations of two arms on families of scenarios, one answer a prompt: right or wrong, as `two_seeds`.

    The arms differ in a family by a normal effect of mean `gain` and standard deviation `spread`.
    """
    generator = np.random.default_rng(seed)
    effect = generator.normal(gain, spread, (pairs, families, 1))
    chance = 0.25 + 0.5 * generator.random((pairs, families, prompts))
    arms = [generator.random(chance.shape) < chance + sign * effect / 2 for sign in (1, -1)]
    return tuple(arm.reshape(pairs, -1).astype(float) for arm in arms)


def test_a_mean_per_token_is_a_ratio_of_sums():
    """Rows of 1 and 9 tokens weigh by their tokens; a resample of the two gives 1, 0 or 0.1."""
    sums = resample([[1.0, 0.0], [1, 9]], alone(2), seed=0)
    assert set(np.round(ratio(sums.resampled), 9)) == {0.0, 0.1, 1.0}
    assert estimate(sums, ratio) == pytest.approx((0.1, 0.0, 1.0))


def test_the_resamples_have_the_spread_of_the_mean():
    values = np.random.default_rng(3).normal(5, 2, 200)
    means = resample([values], alone(200), 0).resampled[:, 0] / 200
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / np.sqrt(200), rel=0.03)


def test_the_columns_of_a_prompt_stay_together():
    values = np.random.default_rng(0).normal(size=30)
    resampled = resample([values, values + 1], alone(30), 0).resampled
    assert resampled[:, 1] - resampled[:, 0] == pytest.approx(np.full(len(resampled), 30))


def test_order_is_of_no_account_and_the_seed_is():
    a, b = np.random.default_rng(1).random((2, 40))
    turned = difference(a[::-1], b[::-1], alone(40), 7)
    assert turned == difference(a, b, alone(40), 7)
    assert difference(a, b, alone(40), 8) != turned
    assert difference(a, b, alone(40), 8) == pytest.approx(turned, abs=0.02)


def test_a_family_is_drawn_with_all_its_prompts():
    """Families of 1 and 3 prompts: the mean over prompts is 1/4; a resample of the two gives 1, 0 or 1/4."""
    sums = resample([[1.0, 0.0, 0.0, 0.0], [1.0] * 4], ["a", "b", "b", "b"], seed=0)
    assert sums.families == 2
    assert set(ratio(sums.resampled)) == {0.0, 0.25, 1.0}
    assert difference([1.0, 0.0, 0.0, 0.0], [0.0] * 4, ["a", "b", "b", "b"], 0) == pytest.approx((0.25, 0.0, 1.0))


def test_copies_of_a_prompt_are_no_evidence():
    """Ten prompts seven times over say what ten say: intervals and test are the same."""
    generator = np.random.default_rng(4)
    a, b = generator.integers(0, 2, (2, 10)).astype(float)
    copies = [np.repeat(values, 7) for values in (a, b)]
    families = np.repeat(alone(10), 7)
    assert difference(*copies, families, 1) == pytest.approx(difference(a, b, alone(10), 1))
    assert proportion(copies[0], families, 1) == pytest.approx(proportion(a, alone(10), 1))
    assert sign_flip(by_family(copies[0] - copies[1], families)) == sign_flip(a - b)


def test_many_prompts_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    values = np.random.default_rng(3).normal(0, 1, 9000)
    half = 1.96 * values.std() / np.sqrt(9000)
    found = difference(values, np.zeros(9000), alone(9000), 0)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_equal_arms_have_no_width_and_one_family_no_interval():
    assert difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], alone(3), 0) == (0.0, 0.0, 0.0)
    assert difference([1.0, 1.0], [0.0, 0.0], ["one", "one"], 0) == (1.0, None, None)
    assert proportion([1.0, 0.0], ["one", "one"], 4) == (0.5, None, None)
    assert not excludes_zero(difference([1.0], [0.0], alone(1), 0))


def test_a_ratio_that_may_divide_by_nothing_has_no_interval():
    assert estimate(resample([[1.0, 1.0], [0.0, 1.0]], alone(2), 0), ratio) == (2.0, None, None)


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
    found = [difference(a, b, alone(prompts), 0) for a, b in pairs]
    missed = sum(not e.low <= 0.1 <= e.high for e in found) / 800
    assert 0.02 <= missed <= 0.067


@pytest.mark.parametrize(
    ("shares", "samples", "expected"),
    [
        # Wilson with t(9) = 2.262 for the normal quantile, by hand: z^2 / (n + z^2)
        ([0.0] * 10, 1, (0.0, 0.0, 5.1174 / 15.1174)),
        ([1.0] * 10, 1, (1.0, 10 / 15.1174, 1.0)),
        # equal within every prompt: four samples are no better than one
        ([0.0] * 5 + [1.0] * 5, 4, proportion([0.0] * 5 + [1.0] * 5, alone(10), 1)),
    ],
)
def test_a_proportion_has_a_wilson_interval(shares, samples, expected):
    assert proportion(shares, alone(10), samples) == pytest.approx(expected, abs=1e-4)


def test_samples_narrow_a_proportion_where_prompts_are_alike():
    generator = np.random.default_rng(0)
    one, four = (proportion(generator.binomial(k, 0.5, 100) / k, alone(100), k) for k in (1, 4))
    assert (one.high - one.low) / (four.high - four.low) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(("prompts", "samples", "shape"), [(10, 1, (1, 9)), (10, 4, (1, 1)), (50, 4, (1, 9))])
def test_a_proportion_covers_the_truth(prompts, samples, shape):
    generator = np.random.default_rng(2)
    draws = generator.binomial(samples, generator.beta(*shape, (1000, prompts))) / samples
    found = [proportion(draw, alone(prompts), samples) for draw in draws]
    assert sum(not e.low <= shape[0] / sum(shape) <= e.high for e in found) / 1000 <= 0.08


def test_a_proportion_of_families_covers_the_truth():
    """14 families of 7 prompts, whose chances are Beta(1, 1): prompts as units miss in 27 of 100."""
    generator = np.random.default_rng(2)
    draws = generator.binomial(1, np.repeat(generator.beta(1, 1, (1000, 14)), 7, axis=1))
    missed = []
    for families in (np.repeat(alone(14), 7), alone(98)):
        found = [proportion(draw, families, 1) for draw in draws]
        missed.append(sum(not e.low <= 0.5 <= e.high for e in found) / 1000)
    assert missed[0] <= 0.07
    assert missed[1] > 0.2


@given(won=st.integers(0, 60), lost=st.integers(0, 60), equal=st.integers(0, 9), size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_single_answers_are_tested_as_mcnemar_does(won, lost, equal, size):
    """Also where all families differ by equally much: only the signs are left."""
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert sign_flip([size] * won + [-size] * lost + [0] * equal) == pytest.approx(expected, rel=1e-9)


@given(nets=st.lists(st.integers(-6, 6), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_test_counts_all_signs(nets):
    reached = [abs(np.dot(signs, nets)) >= abs(sum(nets)) for signs in product((-1, 1), repeat=len(nets))]
    assert sign_flip(nets) == pytest.approx(np.mean(reached))
    assert smallest_p(nets) == pytest.approx(sign_flip(np.abs(nets)))
    assert smallest_p(nets) <= sign_flip(nets)


def test_a_thousand_families_are_tested_exactly():
    nets = np.random.default_rng(0).integers(-50, 51, 1000)
    score = abs(nets.sum()) / np.sqrt((nets**2).sum())
    assert sign_flip(nets) == pytest.approx(2 * norm.sf(score), abs=0.001)


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
    assert minimum_detectable([0] * 5, 5, ALPHA) is None
    assert minimum_detectable([0] * 5, 500, ALPHA) is None
    assert 0.9 < minimum_detectable([0] * 6, 6, ALPHA) < 1
    assert minimum_detectable([0] * 6, 6, ALPHA / 9) is None


def test_more_prompts_and_more_samples_show_less():
    """Four samples halve the size of a difference by chance, and with it the least one that can be shown."""
    found = {}
    for prompts, samples in ((100, 1), (400, 1), (400, 4)):
        a, b = two_seeds(prompts, samples, 0.0, 1, seed=5)
        nets = np.rint((a[0] - b[0]) * samples)
        found[prompts, samples] = minimum_detectable(nets, prompts * samples, ALPHA)
    assert found[100, 1] > 1.7 * found[400, 1]
    assert found[400, 1] > 1.3 * found[400, 4]


@pytest.mark.parametrize(("prompts", "samples"), [(350, 1), (350, 4), (50, 1)])
def test_one_model_under_two_seeds(prompts, samples, monkeypatch):
    """1,000 pairs without a difference: the interval excludes 0 in about 5 %, the exact test calls no more."""
    monkeypatch.setattr(statistics, "RESAMPLES", 10_000 if (prompts, samples) == (350, 1) else 2000)
    arms = two_seeds(prompts, samples, 0.0, 1000, seed=prompts + samples)
    pairs = list(zip(*arms, strict=True))
    assert 0.035 <= np.mean([excludes_zero(difference(a, b, alone(prompts), 0)) for a, b in pairs]) <= 0.065
    assert rejected(arms, samples, alone(prompts)) <= (0.05 if samples == 1 else 0.065)


@pytest.mark.parametrize("spread", [0.3, 0.0])
def test_families_that_differ_by_chance(spread, monkeypatch):
    """1,000 pairs of arms equal over all families: McNemar's test of the prompts calls 14 % where families differ."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    families = np.repeat(alone(14), 7)
    arms = scenario_families(14, 7, spread, 0.0, 1000, seed=1)
    assert 0.02 <= rejected(arms, 1, families) <= 0.05
    assert (rejected_by_mcnemar(arms) > 0.1) == (spread > 0)
    intervals = [difference(a, b, families, 0) for a, b in zip(*arms, strict=True)]
    assert 0.03 <= np.mean([excludes_zero(found) for found in intervals]) <= 0.075


def test_a_gain_in_families_that_differ_is_found():
    """20 points over 28 families whose effects vary by 0.3."""
    assert rejected(scenario_families(28, 7, 0.3, 0.2, 500, seed=2), 1, np.repeat(alone(28), 7)) > 0.7


@pytest.mark.parametrize("prompts", [350, 1500])
def test_a_planted_gain_of_5_points_is_found_at_the_stated_power(prompts):
    """Stated: the exact test's power for the shares of prompts that are won and lost in truth."""
    gain, chance = 0.05, np.linspace(0.25, 0.75, 2001)
    won, lost = np.mean((chance + gain) * (1 - chance)), np.mean(chance * (1 - chance - gain))
    stated = mcnemar_power(prompts, won + lost, won - lost, ALPHA)
    found = rejected(two_seeds(prompts, 1, gain, 1000, seed=3), 1, alone(prompts))
    assert found == pytest.approx(stated, abs=0.04)
    assert stated < 0.4 if prompts == 350 else stated > 0.75


def test_several_answers_find_what_one_does_not():
    """Of 4 answers the test counts how many more are right, which tells more than the signs that McNemar counts."""
    one, four = (two_seeds(350, samples, 0.05, 1000, seed=3) for samples in (1, 4))
    assert rejected(four, 4, alone(350)) > max(rejected_by_mcnemar(four) + 0.05, 2 * rejected(one, 1, alone(350)))


@pytest.mark.parametrize("samples", [1, 4])
def test_the_minimum_detectable_difference_is_found_in_80_of_100(samples):
    nets = np.subtract(*(side[0] for side in two_seeds(2000, samples, 0.0, 1, seed=1))) * samples
    planned = minimum_detectable(np.rint(nets), 2000 * samples, ALPHA)
    arms = two_seeds(2000, samples, planned, 500, seed=2)
    assert rejected(arms, samples, alone(2000)) == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize(("number", "spread"), [(14, 0.0), (14, 0.3), (60, 0.3)])
def test_the_minimum_detectable_difference_of_families(number, spread):
    """Planned from evaluations without a difference, in the mean of forty."""
    families = np.repeat(alone(number), 7)
    planned = []
    for a, b in zip(*scenario_families(number, 7, spread, 0.0, 40, seed=1), strict=True):
        planned.append(minimum_detectable(by_family(a - b, families), len(families), ALPHA))
    arms = scenario_families(number, 7, spread, np.mean(planned), 500, seed=2)
    assert rejected(arms, 1, families) == pytest.approx(0.8, abs=0.07)


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
        ([("2 1/2", True), ("2.5", True), ("3", False), ("3.0", False), ("5/2", True)], 1.0),
        ([("-2 1/2", True), ("-2.5", True), ("2 1/2", False)], 1.0),
        ([("1e3", True), ("1000", True), (".5", False)], 1.0),
        ([], 0.0),
    ],
)
def test_majority(votes, expected):
    assert majority(votes) == expected


def test_crossed_is_students_interval_where_one_of_the_two_varies_alone():
    values = np.array([0.1, 0.4, -0.2, 0.3])
    by_prompt = crossed(np.tile(values, (3, 1)), alone(4))  # every seed says the same
    by_seed = crossed(np.tile(values[:, None], (1, 5)), alone(5))  # every prompt says the same
    half = t.ppf(0.975, 3) * values.std(ddof=1) / 2
    for found, share in ((by_prompt, 0.0), (by_seed, 1.0)):
        assert found.value == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
        assert found.p == pytest.approx(ttest_1samp(values, 0).pvalue)
        assert found.seed_share == pytest.approx(share)


def test_crossed_counts_a_family_as_one():
    values = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    twice = crossed(np.repeat(values, 3, axis=1), np.repeat(alone(4), 3).tolist())
    assert astuple(twice) == pytest.approx(astuple(crossed(values, alone(4))))


def test_crossed_leaves_one_seed_open():
    assert crossed(np.array([[1.0, 0.0]]), alone(2)) == Crossed(0.5, None, None, None, None)
    assert crossed(np.zeros((2, 2)), alone(2)) == Crossed(0.0, 0.0, 0.0, 1.0, None)
    assert crossed(np.ones((2, 2)), alone(2)).p == 0.0


@pytest.mark.parametrize("of_seeds", [0.0, 0.03, 0.1])
def test_crossed_covers(of_seeds):
    """Three seeds, 31 families of ten; what varies between seeds is as little, as much and more than between families.

    Three seeds tell little of how seeds vary: where these decide, an interval of 95 % covers 90.
    """
    generator, covered, called = np.random.default_rng(0), [], []
    families = np.repeat(np.arange(31), 10)
    for _ in range(1000):
        values = generator.normal(0, of_seeds, (3, 1)) + generator.normal(0, 0.1, 31)[families]
        found = crossed(values + generator.normal(0, 0.5, (3, 310)), families.tolist())
        covered.append(found.low <= 0 <= found.high)
        called.append(found.p <= ALPHA)
    assert 0.88 <= np.mean(covered) <= 0.98
    assert np.mean(called) == pytest.approx(1 - np.mean(covered))
