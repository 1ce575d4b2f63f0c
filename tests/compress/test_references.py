"""Reference queries: which positions, that chunks do not matter, and that moving a query is rotating it anew."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepkv_sglang.compress.queries.references import QuerySample
from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.turn.limits import Limits
from keepkv_sglang.turn.plan import plan_chunk
from keepkv_sglang.turn.queries import capture, drop_plan, reference_positions
from keepkv_sglang.turn.state import Planned, RequestState
from tests.support.rotary import rope, table

DIM = 8


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 70))
def test_positions_are_spread_evenly_and_never_more_than_there_are(first, length, count):
    made = reference_positions(first, first + length, count)
    assert len(made) == min(count, length) == len(set(made))
    assert made == sorted(made) and all(first <= p < first + length for p in made)
    gaps = {b - a for a, b in pairwise(made)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_references_stand_behind_the_span_and_the_window_stays():
    raw = torch.randn(7, 3, DIM, dtype=torch.float64)
    positions = [10, 14, 18, 22, 27, 28, 29]  # 4 references, a window of 3
    q = torch.stack([rope(x, p, DIM) for x, p in zip(raw, positions, strict=True)])
    rotary = Rotary(table(400, DIM))
    sample = QuerySample(positions, 4, 30, 25, rotary, torch.float64, torch.device("cpu"))
    moved = sample.place(q)
    for j in range(4):
        torch.testing.assert_close(moved[j], rope(raw[j], 30 + j, DIM), rtol=1e-9, atol=1e-9)
    assert torch.equal(moved[4:], q[4:])
    assert sample.q_index.tolist() == [25, 26, 27, 28, 22, 23, 24], "references see all 25 slots"


@pytest.mark.parametrize("chunk", [1000, 64, 37, 7])
def test_whatever_the_chunks_the_same_queries_are_kept(chunk):
    """A prompt of 200 tokens behind a prefix of 50, the first 10 of its own tokens being an anchor."""
    config = KeepKVConfig(enabled=True, references=20, window=8)
    arena = QueryArena(1, 60, 1, DIM, torch.float64, "cpu")
    limits = Limits(arena)
    state = RequestState(config, (), prompt_tokens=251)
    state.plan = [Planned(end=250, first=60, is_prompt=True)]
    kept: dict[int, int] = {}  # arena row -> logical position
    for start in range(50, 251, chunk):
        end = min(start + chunk, 251)
        plan_chunk(limits, state, start, end, too_long=False)
        out: tuple[list[int], list[int]] = ([], [])
        capture(limits, state, start, end, out, 1000)
        kept |= {row: start + q - 1000 for q, row in zip(*out, strict=True)}
    held = state.plan[0].queries
    assert held is not None and held.filled == len(held.rows) == 28 and held.references == 20
    assert [kept[row] for row in held.rows] == [*reference_positions(60, 242, 20), *range(242, 250)]
    drop_plan(limits, state)
    assert arena.free_rows == 60
