"""Intervals: known means, determinism, pairing."""

from __future__ import annotations

import math

import pytest

from keepkv_sglang.tools.evaluate.statistics import geometric_mean, mean, paired_ratio


def test_mean_of_constants_has_no_width():
    assert mean([3.0] * 5) == (3.0, 3.0, 3.0)


def test_the_interval_is_that_of_the_normal_approximation():
    values = [float(i % 10) for i in range(400)]  # standard error: 2.872 / 20
    got = mean(values)
    assert got.mean == pytest.approx(4.5)
    # 4,000 draws of 400 items: the percentiles are within a few per cent of 1.96 standard errors.
    assert got.high - got.mean == pytest.approx(1.96 * 2.872 / 20, rel=0.1)
    assert got.mean - got.low == pytest.approx(1.96 * 2.872 / 20, rel=0.1)


def test_intervals_are_the_same_every_time():
    values = [0.1, 5.0, 2.0, 0.4]
    assert mean(values) == mean(values)
    assert mean(values).text(1) == f"1.9 [{mean(values).low:.1f}, {mean(values).high:.1f}]"


def test_geometric_mean():
    assert geometric_mean([1.0, 100.0]).mean == pytest.approx(10.0)
    assert geometric_mean([0.0, 1.0]).mean == pytest.approx(1e-6)  # a KL of 0 counts as 1e-12


def test_a_paired_ratio_sees_through_items_that_differ_a_lot():
    base = [10.0 ** (i % 5) for i in range(50)]
    half = paired_ratio([b / 2 for b in base], base)
    assert half.mean == pytest.approx(0.5) and half.low == pytest.approx(0.5) and half.high == pytest.approx(0.5)
    assert math.isclose(paired_ratio(base, base).mean, 1.0)
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])
