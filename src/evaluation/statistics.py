"""Uncertainty of scores and of paired differences: families of prompts are the unit, and the tests are exact.

Rows of one family are variants of one scenario: whether an arm is right on one says much about the others. So families,
not prompts, are resampled, counted and tested; a prompt by itself is a family of one. learn.md, "What does an
interval say", has the reasons and what was measured.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, sqrt
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm, t

from src.grading.numeric import NUMBER, number_value

RESAMPLES = 10_000  # of every bootstrap
ALPHA = 0.05  # two-sided: intervals are of 95 %
POWER = 0.8  # at which the least detectable difference is given


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval; None where one family alone, or a division by 0, leaves it open."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Sums:
    """Column sums over families, and the same over resampled families.

    total: `[M]`; resampled: `[RESAMPLES, M]`; families: how many.
    """

    total: np.ndarray
    resampled: np.ndarray
    families: int


def excludes_zero(estimate: Estimate) -> bool:
    # an interval that ends at 0 shows nothing
    return estimate.low is not None and (estimate.low > 0 or estimate.high < 0)


def by_family(values: np.ndarray, families: Sequence[str]) -> np.ndarray:
    """Sums over the prompts of each family, `[n, ...]` to `[F, ...]`; `families` names that of each of n prompts."""
    _, family_n = np.unique(np.asarray(families), return_inverse=True)  # ["b", "a", "b"] -> [1, 0, 1]
    sums = np.zeros((family_n.max() + 1, *values.shape[1:]), values.dtype)
    # `sums[family_n] += values` would add one prompt of each family only
    np.add.at(sums, family_n, values)
    return sums


def resample(columns: Sequence[Sequence[float]] | np.ndarray, families: Sequence[str], seed: int) -> Sums:
    """Sums of the columns over families drawn with replacement, all prompts and columns of a family together.

    Args:
        columns: `[M, n]`: for each quantity its value on each of n prompts.
        families: of each prompt, its family.
        seed: of the resampling; the order of the prompts is of no account.
    """
    # 1. a row for each family: what is drawn is drawn with all its prompts and all columns
    sums_FM = by_family(np.asarray(columns, float).T, families)
    # 2. the distinct rows, sorted by value: that is why the order of the prompts is of no account
    # families with equal rows are interchangeable: how often each kind is drawn is multinomial
    kinds, counts = np.unique(sums_FM, axis=0, return_counts=True)
    # 3. the sums of each resample, in parts of at most some 4 million counts (32 MB)
    generator = np.random.default_rng(seed)
    resampled = np.empty((RESAMPLES, kinds.shape[1]))
    step = max(1, 4_000_000 // len(kinds))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        # [size, kinds]: how often each kind of row is drawn
        drawn = generator.multinomial(len(sums_FM), counts / len(sums_FM), size)
        resampled[start : start + size] = drawn @ kinds
    return Sums(counts @ kinds, resampled, len(sums_FM))


def estimate(sums: Sums, statistic: Callable[[np.ndarray], Any]) -> Estimate:
    """A function of column sums with its expanded percentile interval (Hesterberg 2015).

    The percentile interval is too narrow by sqrt((F - 1) / F) of F families and takes normal quantiles where t
    quantiles are due; both are put right by quantiles further out. From F = 50 on it is the percentile interval for all
    purposes.

    Args:
        statistic: maps sums `[..., M]` to `[...]`.
    """
    # a ratio may divide by 0 in some resamples: they become inf or nan, and there is no interval
    with np.errstate(divide="ignore", invalid="ignore"):
        value, values = float(statistic(sums.total)), statistic(sums.resampled)
    count = sums.families
    if count < 2 or not np.isfinite(values).all():
        return Estimate(value, None, None)
    # Phi(sqrt(F / (F - 1)) t), the lower t quantile: 0.0086 at F = 10 instead of 0.025
    tail = norm.cdf(t.ppf(ALPHA / 2, count - 1) * sqrt(count / (count - 1)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def difference(a: Sequence[float], b: Sequence[float], families: Sequence[str], seed: int) -> Estimate:
    """The mean over prompts of a - b; in a resample, of the prompts of the families drawn."""
    gaps = np.asarray(a, float) - np.asarray(b, float)
    # columns: sum of the gaps, number of prompts
    return estimate(resample([gaps, np.ones_like(gaps)], families, seed), lambda s: s[..., 0] / s[..., 1])


def proportion(shares: Sequence[float], families: Sequence[str], samples: int) -> Estimate:
    """A mean of shares with a Wilson interval at the effective number of answers (Korn and Graubard 1998).

    A bootstrap of ten wrong answers has no width; this interval has. The effective number is that of independent
    answers with the same standard error, which is the cluster-robust one of a ratio: from the families' sums of
    deviations. It lies between the number of families and of answers; the quantile is a t quantile.

    Args:
        shares: of each prompt, the share of its answers that are right.
        families: of each prompt, its family.
        samples: answers a prompt.
    """
    # 1. the variance of the mean, with families as clusters
    shares_n = np.asarray(shares, float)
    prompts, mean = len(shares_n), float(shares_n.mean())
    deviations_F = by_family(shares_n - mean, families)
    count = len(deviations_F)
    if count < 2:
        return Estimate(mean, None, None)
    variance = count / (count - 1) * float(deviations_F @ deviations_F) / prompts**2
    # 2. the effective number: so many independent answers have that variance, mean (1 - mean) / size
    size = count  # families that are all alike do not say how alike the answers of one are
    if variance > 1e-12:  # a real one is larger: one answer of 64 that differs on one prompt of 1,000 gives 2e-10
        size = min(max(mean * (1 - mean) / variance, count), prompts * samples)
    # 3. Wilson's interval for that number, with t for the normal quantile
    z = float(t.ppf(1 - ALPHA / 2, count - 1))
    centre, half = mean + z * z / (2 * size), z * sqrt(mean * (1 - mean) / size + z * z / (4 * size * size))
    low, high = ((centre + sign * half) / (1 + z * z / size) for sign in (-1, 1))
    # at a mean of 0 or 1 one end is the mean, but for rounding
    return Estimate(mean, max(min(low, mean), 0.0), min(max(high, mean), 1.0))


def discordant(a: Sequence[float], b: Sequence[float]) -> tuple[int, int]:
    """How many prompts a wins and loses against b: has more, or fewer, right answers. Equal prompts drop out.

    With one answer a prompt these are McNemar's two discordant counts.
    """
    return sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True))


def sign_flip(nets: Sequence[int] | np.ndarray) -> float:
    """The exact two-sided p-value of Fisher's randomisation test of paired differences (1935).

    Without a difference between the arms, each family's net count is as likely to have the other sign. The statistic is
    the sum of the counts; its distribution over all signs is a convolution, not a simulation. Where every family is one
    prompt with one answer this is McNemar's exact test (the sign test of discordant prompts).

    Args:
        nets: `[F]`: of each family, the right answers of one arm less those of the other.
    """
    nets_F = np.asarray(nets, int)
    nets_F = nets_F[nets_F != 0]  # 0 has no sign to flip
    if not len(nets_F):
        return 1.0
    # [2, -4, 6] -> [1, -2, 3]: sums stand in the same order, and the convolution is shorter
    nets_F = nets_F // np.gcd.reduce(nets_F)
    sizes = np.abs(nets_F)
    chance_W = np.ones(1)  # of W = 0, 1, ...: the sum of the sizes whose sign is plus
    for size in sizes:
        # half of the chance stays where it is (minus), half moves up by `size` (plus)
        longer = np.zeros(len(chance_W) + size)
        longer[:-size] += chance_W / 2
        longer[size:] += chance_W / 2
        chance_W = longer
    # the statistic is 2 W - sum of sizes and symmetric: as far out as the observed is W at most this, or its mirror
    # both sums are odd or both are even, so the halving loses nothing
    lowest = (sizes.sum() - abs(nets_F.sum())) // 2
    return min(1.0, 2 * float(chance_W[: lowest + 1].sum()))


def smallest_p(nets: Sequence[int] | np.ndarray) -> float:
    """The p-value of `sign_flip` if every family that differs did so for one arm: 2 of its 2^m signs; 1 without any.

    Given the sizes of the differences it is fixed before their signs are seen. A test whose smallest p-value is above
    the level can never reject, and a correction need not count it (Tarone 1990).
    """
    return min(1.0, 2 * 0.5 ** int(np.count_nonzero(nets)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): those at most 0.05 keep the chance of any false one at 5 %."""
    adjusted, running = [0.0] * len(p_values), 0.0
    # the smallest counts times m, the next times m - 1, ...; none may be below the one before it
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def mcnemar_power(families: int, differing: float, net: float, alpha: float) -> float:
    """The chance that the exact test calls a true difference, in its direction or against it.

    Args:
        families: how many, each won, lost or equal, and all that differ by equally much.
        differing: share of families on which the arms differ, in truth.
        net: share won less share lost, in truth; at most `differing`.
    """
    # 1. for each number of families that may differ, how one-sided they must be
    counts = np.arange(families + 1)
    critical = binom.ppf(alpha / 2, counts, 0.5)  # the most losses (or wins) at which it still calls
    # `ppf` gives the first count whose chance reaches alpha / 2: one less where it passes it, -1 for never
    critical -= binom.cdf(critical, counts, 0.5) > alpha / 2
    # 2. the chance of a call among so many: few losses, or few wins
    won = (1 + net / differing) / 2
    calls = binom.cdf(critical, counts, 1 - won) + binom.cdf(critical, counts, won)
    # 3. over how many may differ
    return float(binom.pmf(counts, families, differing) @ calls)


def minimum_detectable(nets: Sequence[int] | np.ndarray, answers: int, alpha: float) -> float | None:
    """The smallest true difference of accuracy that the exact test at `alpha` calls with 80 % power; None if no
    difference is large enough.

    Where every family is one answer, it is exact for these shares of families that differ. Else two approximations,
    and the larger counts: signs alone (`_by_signs`), which knows how few families differ, and a shift of all families
    (`_by_shift`), which knows that a true difference makes the families' own larger.

    Args:
        nets: `[F]`: of each family, the right answers of one arm less those of the other.
        answers: of one arm, over all families.
    """
    gaps = np.abs(np.asarray(nets, float)) / answers  # what each family adds to the difference of accuracy
    least = _by_signs(gaps, alpha)
    if least is None or answers == len(gaps):  # one answer a family: `_by_signs` is exact
        return least
    return min(1.0, max(least, _by_shift(gaps, alpha)))


def _by_signs(gaps: np.ndarray, alpha: float) -> float | None:
    """The least difference where families differ as often and by as much as these `[F]`, and only signs have causes.

    The sign of each is tilted, the log-odds in proportion to its size. Where even all signs alike are not enough, more
    families are supposed to differ, by as much as these do; where none differs, by all of their answers. The power is
    that of equally many families which all differ by the root mean square of the sizes: the same ratio of mean to
    spread, to first order in the tilt.
    """
    families, sizes = len(gaps), gaps[gaps > 0]
    differing = len(sizes) / families
    if not len(sizes):
        sizes = np.full(1, 1 / families)  # the answers of one family, as a share of all

    # both are below 0 where the power is short of 80 %, and `brentq` looks for their zero
    def lacking_tilted(net: float) -> float:
        return mcnemar_power(families, differing, net, alpha) - POWER

    def lacking_alike(share: float) -> float:
        return mcnemar_power(families, share, share, alpha) - POWER

    # not even all families, won by one arm, would be called: there are too few
    if lacking_alike(1.0) < 0:
        return None
    # the families that differ are enough: how far must their signs lean?
    if differing and lacking_tilted(differing) > 0:
        net = brentq(lacking_tilted, 0.0, differing)
        # a sign with log-odds 2 tilt s is tanh(tilt s) on average; at the root mean square s that is net / differing
        tilt = np.arctanh(net / differing) / sqrt(float((sizes**2).mean()))
        return float((sizes * np.tanh(tilt * sizes)).sum())
    # more families must differ, all for one arm; not from 0 on, which `mcnemar_power` divides by
    return float(brentq(lacking_alike, max(differing, 1e-9), 1.0)) * families * float(sizes.mean())


def _by_shift(gaps: np.ndarray, alpha: float) -> float:
    """The least difference by which families `[F]` that vary as much as these around 0 are all shifted: a t-test's."""
    families = len(gaps)
    # gaps are shares of all answers, so their squares are summed, not averaged
    error = sqrt(families / (families - 1) * float(gaps @ gaps))  # few families understate it, as in a bootstrap
    # to be called at alpha, and that in 80 of 100
    return error * float(t.ppf(1 - alpha / 2, families - 1) + t.ppf(POWER, families - 1))


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that of k answers at least one is right, unbiased (Chen et al. 2021, equation 1)."""
    return 1 - comb(answers - right, k) / comb(answers, k)  # 1 less the share of draws that are all wrong


def majority(votes: Sequence[tuple[str, bool]]) -> float:
    """Whether the most frequent of several numbers is right; equally frequent ones share the verdict; no votes, 0.

    Args:
        votes: of each answer that gave one, its number as text, and whether it is right.
    """

    # "2.5", "5/2" and "2 1/2" are one vote, read as the grader reads them; a text that is no number is one by itself
    def value(text: str) -> Fraction | str:
        number = number_value(NUMBER.fullmatch(text))
        return number[1] if number else text

    if not votes:
        return 0.0
    right = {value(text): correct for text, correct in votes}
    counts = Counter(value(text) for text, _ in votes)
    winners = [number for number, count in counts.items() if count == max(counts.values())]
    return sum(right[number] for number in winners) / len(winners)


@dataclass(frozen=True)
class Crossed:
    """A mean over training seeds and prompts; where one seed or family alone leaves it open, without an interval.

    low, high: an approximate 95 % interval; p: of the mean being 0, two-sided.
    seed_share: of the variance, what lies between seeds (the rest between families of prompts); None without any.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    seed_share: float | None


def crossed(values_SP: np.ndarray, families: Sequence[str]) -> Crossed:
    """A mean over training seeds and prompts where every seed has answered every prompt; with its interval.

    Both are samples: another seed gives another model, another family of prompts other questions. The variance of a
    mean over two crossed clusterings is that between seeds, plus that between families, less that of single cells,
    which the first two count twice (Cameron, Gelbach and Miller 2011, equation 2.4; not below the larger of the two).
    The quantile is Student's with Satterthwaite's degrees of freedom (1946): near the number of seeds less one where
    seeds decide, near that of families where these do.

    The interval is approximate: three seeds tell little of how seeds vary, and where that is underestimated by luck the
    variance is too small and the degrees of freedom too many. In a simulation it covers 90 to 96 % (learn.md, "What
    does an interval say").

    Args:
        values_SP: `[seeds, prompts]`, such as the difference of two arms' scores.
        families: of each prompt, its family.
    """
    values = np.asarray(values_SP, float)
    mean = float(values.mean())
    # what every seed and family adds to the mean's deviation
    residuals_SF = by_family((values - mean).T, families).T / values.size
    seeds, count = residuals_SF.shape
    if seeds < 2 or count < 2:
        return Crossed(mean, None, None, None, None)
    # 1. the three variances, each with the correction of few clusters, G / (G - 1)
    of_seeds = float((residuals_SF.sum(1) ** 2).sum()) * seeds / (seeds - 1)
    of_families = float((residuals_SF.sum(0) ** 2).sum()) * count / (count - 1)
    of_cells = float((residuals_SF**2).sum()) * seeds * count / (seeds * count - 1)
    variance = max(of_seeds + of_families - of_cells, of_seeds, of_families)
    # no spread at all, so no freedom to divide by either
    if variance == 0:
        return Crossed(mean, mean, mean, float(mean == 0), None)
    # 2. interval and p
    freedom = (of_seeds + of_families) ** 2 / (of_seeds**2 / (seeds - 1) + of_families**2 / (count - 1))
    error = sqrt(variance)
    half = float(t.ppf(1 - ALPHA / 2, freedom)) * error
    p = 2 * float(t.sf(abs(mean) / error, freedom))
    return Crossed(mean, mean - half, mean + half, p, of_seeds / (of_seeds + of_families))
