"""Uncertainty of a mean and of a paired difference, by resampling whole prompts."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A value and the ends of its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(sums_a: np.ndarray, sums_b: np.ndarray | None, weights: np.ndarray, seed: int) -> Estimate:
    """A weighted mean of rows, or the difference of two on the same rows (a - b), with a paired bootstrap interval.

    Rows are the resampling unit (Efron and Tibshirani 1993, section 13.3); both arms of a pair are always drawn
    together, and the weights with them, so that a mean per token keeps its denominator.

    Args:
        sums_a: `[n]`, a row's sum (for example its KL over all tokens); `sums_b` the other arm's, in the same order,
            or None for a plain mean.
        weights: `[n]`, what a row's sum is a sum over (its tokens, or its samples).
        seed: of the resampling.
    """
    difference = np.asarray(sums_a, float) - (0 if sums_b is None else np.asarray(sums_b, float))
    weights = np.asarray(weights, float)
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, 2_000_000 // len(weights))
    for start in range(0, RESAMPLES, step):
        draws = generator.integers(0, len(weights), (min(step, RESAMPLES - start), len(weights)))
        means[start : start + len(draws)] = difference[draws].sum(1) / weights[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(difference.sum() / weights.sum()), float(low), float(high))


def excludes_zero(estimate: Estimate) -> bool:
    return estimate.low > 0 or estimate.high < 0
