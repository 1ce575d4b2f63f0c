"""Means over documents and their 95 % bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

DRAWS = 4000


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval over items."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """'0.66 [0.51, 0.82]'"""
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean(values: Sequence[float]) -> Interval:
    """Arithmetic mean."""
    x = torch.tensor(list(values), dtype=torch.float64)
    draws = x[torch.randint(len(x), (DRAWS, len(x)), generator=torch.Generator().manual_seed(0))].mean(1)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(x.mean()), low, high)


def geometric_mean(values: Sequence[float]) -> Interval:
    """exp of the mean logarithm; values must be positive (a KL of exactly 0 counts as 1e-12)."""
    return Interval(*(math.exp(v) for v in mean([math.log(max(v, 1e-12)) for v in values])))


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Geometric mean of value / base over the same items."""
    return geometric_mean([max(v, 1e-12) / max(b, 1e-12) for v, b in zip(values, base, strict=True)])
