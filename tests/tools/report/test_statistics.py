"""Intervals: known means, determinism, pairing, two stages; percentiles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keepkv_sglang.tools.report.statistics import (
    geometric_mean,
    mean,
    median,
    median_interval,
    paired_ratio,
    percentile,
    weighted_mean,
)


def test_the_mean_of_constants_or_of_one_item_has_no_width():
    for values in ([3.0] * 5, [3.0]):
        got = mean(values)
        assert (got.mean, got.low, got.high) == (3.0, 3.0, 3.0)


def test_the_interval_is_that_of_the_normal_approximation():
    values = [float(i % 10) for i in range(400)]  # standard error: 2.872 / 20
    got = mean(values)
    assert got.mean == pytest.approx(4.5)
    # 4,000 resamples of 400 items: the percentiles are within a few per cent of 1.96 standard errors.
    assert got.high - got.mean == pytest.approx(1.96 * 2.872 / 20, rel=0.1)
    assert got.mean - got.low == pytest.approx(1.96 * 2.872 / 20, rel=0.1)


def test_intervals_are_the_same_every_time():
    values = [0.1, 5.0, 2.0, 0.4]
    assert mean(values).interval == mean(values).interval
    assert mean(values).text(1) == f"1.9 [{mean(values).low:.1f}, {mean(values).high:.1f}]"


def test_geometric_mean():
    assert geometric_mean([1.0, 100.0]).mean == pytest.approx(10.0)
    assert geometric_mean([0.0, 1.0]).mean == pytest.approx(1e-6)  # a KL of 0 counts as 1e-12
    assert math.isnan(geometric_mean([math.nan]).mean)


def test_the_interval_of_a_geometric_mean_is_that_of_the_mean_logarithm():
    values = np.exp(np.random.default_rng(1).normal(size=200))
    got, logs = geometric_mean(values), mean(np.log(values))
    # Not equal to the last digit: percentiles are interpolated between values, not between logarithms.
    assert [got.mean, got.low, got.high] == pytest.approx(np.exp([logs.mean, logs.low, logs.high]), rel=1e-3)


def test_a_paired_ratio_sees_through_items_that_differ_a_lot():
    base = [10.0 ** (i % 5) for i in range(50)]
    half = paired_ratio([b / 2 for b in base], base)
    assert half.mean == pytest.approx(0.5) and half.low == pytest.approx(0.5) and half.high == pytest.approx(0.5)
    assert math.isclose(paired_ratio(base, base).mean, 1.0)
    with pytest.raises(ValueError, match="no pairs"):
        paired_ratio([1.0], [1.0, 2.0])


def test_a_weighted_mean_is_that_of_all_parts_together():
    values, weights = [0.0, 1.0, 0.5], [1.0, 2.0, 1.0]
    got = weighted_mean(values, weights)
    assert got.mean == pytest.approx(2.5 / 4) and got.low < got.mean < got.high
    assert got.interval == weighted_mean(values, weights).interval
    assert weighted_mean(values, [3.0] * 3).mean == pytest.approx(mean(values).mean)
    constant = weighted_mean([2.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])  # an item is resampled with its own weight
    assert constant.low == constant.high == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no pairs"):
        weighted_mean([1.0], [1.0, 2.0])


def test_percentiles_lie_between_ranks():
    assert percentile([4, 1, 3, 2], 50) == median([4, 1, 3, 2]) == 2.5
    assert percentile([1, 2], 90) == pytest.approx(1.9)
    assert percentile([7], 99) == 7
    assert math.isnan(percentile([], 50)) and math.isnan(percentile([math.nan], 50))
    assert percentile([1, math.nan, 3], 50) == 2


def test_an_interval_of_medians_is_as_wide_as_the_groups_differ():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(6, 20))
    alike, apart = (median_interval(values + shift * np.arange(6)[:, None], 0.9) for shift in (0.0, 5.0))
    assert alike[0] < np.median(values) < alike[1] < alike[0] + 1
    assert apart[1] - apart[0] > 10
    assert median_interval([[1.0, 1.0]] * 3, 0.9) == (1.0, 1.0)
