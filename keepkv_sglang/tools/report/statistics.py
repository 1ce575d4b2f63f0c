"""Means, medians and percentiles over items, and their bootstrap intervals, by numpy and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

RESAMPLES = 4000
SEED = 0  # the same numbers give the same interval
SMALLEST = 1e-12  # what a value of 0 counts as in a geometric mean


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over items and its 95 % percentile bootstrap interval: what is resampled is whole items.

    statistic: numpy.mean or scipy.stats.gmean, or of (items, weights) where they have weights. The interval is computed
    when it is asked for."""

    items: np.ndarray
    statistic: Callable[..., float]
    weights: np.ndarray | None = None

    @property
    def _data(self) -> tuple[np.ndarray, ...]:
        return (self.items,) if self.weights is None else (self.items, self.weights)

    @cached_property
    def mean(self) -> float:
        return float(self.statistic(*self._data))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """(low, high); of a single item, where there is nothing to resample, twice the mean."""
        if len(self.items) < 2:
            return self.mean, self.mean
        found = stats.bootstrap(
            self._data, self.statistic, n_resamples=RESAMPLES, confidence_level=0.95, method="percentile", paired=True,
            rng=np.random.default_rng(SEED),
        )  # fmt: skip
        return float(found.confidence_interval.low), float(found.confidence_interval.high)

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]

    def text(self, digits: int = 2) -> str:
        """'0.66 [0.51, 0.82]'"""
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean(values: Sequence[float]) -> Estimate:
    """Arithmetic mean."""
    return Estimate(np.asarray(values, dtype=np.float64), np.mean)


def geometric_mean(values: Sequence[float]) -> Estimate:
    """Geometric mean. Values must not be negative; a KL of exactly 0 counts as SMALLEST."""
    return Estimate(np.maximum(np.asarray(values, dtype=np.float64), SMALLEST), stats.gmean)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """sum(value * weight) / sum(weight); an item is resampled with its weight, which is above 0. ValueError for
    different numbers of them."""
    if len(values) != len(weights):
        raise ValueError(f"{len(values)} values and {len(weights)} weights are no pairs")
    items, weight = (np.asarray(x, dtype=np.float64) for x in (values, weights))
    return Estimate(items, _weighted, weight)


def _weighted(items: np.ndarray, weights: np.ndarray, axis: int = -1) -> float:
    total: float = (items * weights).sum(axis) / weights.sum(axis)
    return total


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """Geometric mean of value / base over the same items; items are resampled as pairs. ValueError for different
    numbers of them."""
    if len(values) != len(base):
        raise ValueError(f"{len(values)} values and {len(base)} to divide by are no pairs")
    above, below = (np.maximum(np.asarray(x, dtype=np.float64), SMALLEST) for x in (values, base))
    return Estimate(above / below, stats.gmean)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. NaN values are left out; NaN of nothing."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(np.percentile(known, percent)) if known.size else math.nan


def median(values: Sequence[float]) -> float:
    """The 50th percentile, with its rules."""
    return percentile(values, 50)


def median_interval(groups: Sequence[Sequence[float]], confidence: float) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval of the median over all values of groups of one size. Two stages:
    groups are resampled, then the values of each. scipy.stats.bootstrap has one stage only."""
    rng, values = np.random.default_rng(SEED), np.asarray(groups, dtype=np.float64)
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))]
    drawn = np.take_along_axis(drawn, rng.integers(values.shape[1], size=drawn.shape), axis=2)
    outside = 50 * (1 - confidence)
    low, high = np.percentile(np.median(drawn, axis=(1, 2)), [outside, 100 - outside])
    return float(low), float(high)
