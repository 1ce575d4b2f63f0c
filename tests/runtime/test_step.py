"""How much of what is due one scheduler step compresses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from keepkv_sglang.runtime import step
from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.settings.config import KeepKVConfig

STEP_TOKENS = 300


def due(waited: list[int], free: int, prompts: tuple[int, ...] = ()) -> tuple[list[int], int]:
    """Rows of 100 slots that are all due, the reply of row i for waited[i] tokens; rows in `prompts` have a prompt due.
    Returns which are compressed in this step, in order, and how many were put off."""
    reqs = []
    for index, tokens in enumerate(waited):
        state = SimpleNamespace(
            plan=[0] if index in prompts else [],
            reply_queries=0,
            admitted=True,
            offset=0,
            interval_start=100 - tokens,
            compression=None,
        )
        kv = SimpleNamespace(holds_kv=True, kv_committed_len=100)
        reqs.append(SimpleNamespace(keepkv=state, finished=lambda: False, kv=kv))
    runtime = SimpleNamespace(
        allocator=SimpleNamespace(available_size=lambda: free),
        tree=SimpleNamespace(evictable_size=lambda: 0),
        config=KeepKVConfig(enabled=True, step_tokens=STEP_TOKENS),
        counters=Counters(),
    )
    found = list(step._due(runtime, SimpleNamespace(reqs=reqs)))
    return [index for index, *_ in found], runtime.counters.deferred


@pytest.fixture(autouse=True)
def hundred_slots_each(monkeypatch):
    monkeypatch.setattr(step.spans, "due_slots", lambda state, committed: committed)


def test_rows_that_are_due_together_wait_for_each_other():
    """n = 32 replies reach their interval in the same step: three of them are compressed in it."""
    assert due([128] * 32, free=1000) == ([0, 1, 2], 29)


def test_prompts_first_then_who_waits_longest():
    assert due([10, 30, 20, 5], free=1000, prompts=(3,)) == ([3, 1, 2], 1)


def test_nobody_waits_where_the_step_is_short_of_slots():
    assert due([128] * 8, free=15) == ([*range(8)], 0)
