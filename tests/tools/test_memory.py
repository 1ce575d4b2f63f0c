"""What the formulas of benchmarks/memory.py (docs/scaling.md) say against tensors and tracemalloc."""

from __future__ import annotations

import pytest

from benchmarks import memory
from keepkv_sglang.settings.config import KeepKVConfig


@pytest.fixture(scope="module")
def rows():
    return {what: (formula, found) for what, formula, found in memory.rows()}


@pytest.mark.parametrize("what", ["votes per slot", "queries per arena row"])
def test_tensors_are_as_large_as_the_formula_says(rows, what):
    formula, found = rows[what]
    assert found == formula


def test_a_cached_token_costs_eight_host_bytes(rows):
    formula, found = rows["host, per further token of a cached span"]
    assert found == pytest.approx(formula, rel=0.05)


def test_spans_and_requests_stay_below_their_bounds(rows):
    bounded = {what: row for what, row in rows.items() if "at most" in what}
    assert len(bounded) == 3
    for what, (formula, found) in bounded.items():
        assert 0.5 * formula < found <= formula, what


def test_large_models_hold_few_windows_at_once():
    """The arena's bytes, not its 64 windows, are the limit for 70B: docs/scaling.md says what that means."""
    config = KeepKVConfig(enabled=True, window=32, references=256)
    shape = memory.LLAMA_70B_TP8
    assert (shape.kv, shape.votes, shape.query) == (40_960, 320, 163_840)
    assert shape.arena_rows(config) // 288 == 11
    assert shape.arena_rows(config, 48 << 30) // 288 == 43
    assert (shape.arena_rows(config, 48 << 30) + 1) * shape.query <= 0.04 * (48 << 30)
    assert memory.DEMO.arena_rows(config) == (512 << 20) // memory.DEMO.query - 1
