"""Uncertainty of scores and of paired differences: whole prompts are the unit, and the tests are exact.

learn.md, section 16, has the reasons and what was measured.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import comb, sqrt
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm, t

RESAMPLES = 10_000
ALPHA = 0.05
POWER = 0.8


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval; None where one prompt alone, or a division by 0, leaves it open."""

    value: float
    low: float | None
    high: float | None


class Sums(NamedTuple):
    """Column sums over prompts, and the same over resampled prompts.

    total: `[M]`; resampled: `[RESAMPLES, M]`; prompts: how many.
    """

    total: np.ndarray
    resampled: np.ndarray
    prompts: int


def excludes_zero(estimate: Estimate) -> bool:
    return estimate.low is not None and (estimate.low > 0 or estimate.high < 0)


def resample(columns: Sequence[Sequence[float]] | np.ndarray, seed: int) -> Sums:
    """Sums of the columns over prompts drawn with replacement, the columns of a prompt always together.

    Args:
        columns: `[M, n]`: for each quantity its value on each of n prompts.
        seed: of the resampling; the order of the prompts is of no account.
    """
    rows = np.asarray(columns, float).T
    # prompts with equal rows are interchangeable: how often each kind is drawn is multinomial
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    resampled = np.empty((RESAMPLES, kinds.shape[1]))
    step = max(1, 4_000_000 // len(kinds))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        resampled[start : start + size] = generator.multinomial(len(rows), counts / len(rows), size) @ kinds
    return Sums(counts @ kinds, resampled, len(rows))


def estimate(sums: Sums, statistic: Callable[[np.ndarray], Any]) -> Estimate:
    """A function of column sums with its expanded percentile interval (Hesterberg 2015).

    The percentile interval is too narrow by sqrt((n - 1) / n) and takes normal quantiles where t quantiles are due;
    both are put right by quantiles further out. From n = 50 on it is the percentile interval for all purposes.

    Args:
        statistic: maps sums `[..., M]` to `[...]`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value, values = float(statistic(sums.total)), statistic(sums.resampled)
    n = sums.prompts
    if n < 2 or not np.isfinite(values).all():
        return Estimate(value, None, None)
    tail = norm.cdf(t.ppf(ALPHA / 2, n - 1) * sqrt(n / (n - 1)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def difference(a: Sequence[float], b: Sequence[float], seed: int) -> Estimate:
    """The mean over prompts of a - b."""
    return estimate(resample([np.asarray(a, float) - np.asarray(b, float)], seed), lambda s: s[..., 0] / len(a))


def proportion(shares: Sequence[float], samples: int) -> Estimate:
    """A mean of shares with a Wilson interval at the effective number of answers (Korn and Graubard 1998).

    A bootstrap of ten wrong answers has no width; this interval has. The effective number is that of independent
    answers with the same standard error, between the number of prompts and of answers; the quantile is a t quantile.

    Args:
        shares: of each prompt, the share of its answers that are right.
        samples: answers a prompt.
    """
    n, mean = len(shares), float(np.mean(shares))
    if n < 2:
        return Estimate(mean, None, None)
    variance = float(np.var(shares, ddof=1))
    size = min(max(mean * (1 - mean) * n / variance, n), n * samples) if variance else n
    z = float(t.ppf(1 - ALPHA / 2, n - 1))
    centre, half = mean + z * z / (2 * size), z * sqrt(mean * (1 - mean) / size + z * z / (4 * size * size))
    low, high = ((centre + sign * half) / (1 + z * z / size) for sign in (-1, 1))
    return Estimate(mean, max(min(low, mean), 0.0), min(max(high, mean), 1.0))


def discordant(a: Sequence[float], b: Sequence[float]) -> tuple[int, int]:
    """How many prompts a wins and loses against b: has more, or fewer, right answers. Equal prompts drop out.

    With one answer a prompt these are McNemar's two discordant counts.
    """
    return sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True))


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test (the sign test of discordant prompts)."""
    return min(1.0, 2 * float(binom.cdf(min(won, lost), won + lost, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): those at most 0.05 keep the chance of any false one at 5 %."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def mcnemar_power(prompts: int, differing: float, net: float, alpha: float) -> float:
    """The chance that the exact test calls a true difference, in its direction or against it.

    Args:
        differing: share of prompts on which the arms differ, in truth.
        net: share won less share lost, in truth; at most `differing`.
    """
    counts = np.arange(prompts + 1)
    critical = binom.ppf(alpha / 2, counts, 0.5)  # the most losses (or wins) at which it still calls
    critical -= binom.cdf(critical, counts, 0.5) > alpha / 2
    won = (1 + net / differing) / 2
    calls = binom.cdf(critical, counts, 1 - won) + binom.cdf(critical, counts, won)
    return float(binom.pmf(counts, prompts, differing) @ calls)


def minimum_detectable(a: Sequence[float], b: Sequence[float], alpha: float) -> float | None:
    """The smallest true difference of means that the exact test at `alpha` calls with 80 % power; None if no
    difference is large enough.

    The prompts at hand say which of them differ and by how much; in the supposed truth the sign of each difference is
    tilted, the log-odds in proportion to its size (with one answer a prompt: the same for all). Where even all signs
    alike are not enough, more prompts are supposed to differ, by as much as these do.
    """
    gaps = np.abs(np.asarray(a, float) - np.asarray(b, float))
    sizes = gaps[gaps > 0] if gaps.any() else np.ones(1)
    n, differing = len(gaps), float((gaps > 0).mean())

    def lacking_tilted(tilt: float) -> float:
        return mcnemar_power(n, differing, differing * float(np.tanh(tilt * sizes).mean()), alpha) - POWER

    def lacking_alike(share: float) -> float:
        return mcnemar_power(n, share, share, alpha) - POWER

    if lacking_alike(1.0) < 0:
        return None
    largest = 20 / float(sizes.min())  # tanh(20) is 1
    if differing and lacking_tilted(largest) > 0:
        tilt = brentq(lacking_tilted, 0.0, largest)
        return differing * float((sizes * np.tanh(tilt * sizes)).mean())
    return float(brentq(lacking_alike, max(differing, 1e-9), 1.0)) * float(sizes.mean())


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that of k answers at least one is right, unbiased (Chen et al. 2021, equation 1)."""
    return 1 - comb(answers - right, k) / comb(answers, k)


def majority(votes: Sequence[tuple[str, bool]]) -> float:
    """Whether the most frequent of several numbers is right; equally frequent ones share the verdict; no votes, 0.

    Args:
        votes: of each answer that gave one, its number as text, and whether it is right.
    """

    def value(text: str) -> Fraction | str:
        try:
            return Fraction(text)
        except (ValueError, ZeroDivisionError):
            return text

    if not votes:
        return 0.0
    right = {value(text): correct for text, correct in votes}
    counts = Counter(value(text) for text, _ in votes)
    winners = [number for number, count in counts.items() if count == max(counts.values())]
    return sum(right[number] for number in winners) / len(winners)
