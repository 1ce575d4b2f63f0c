"""Compresses the spans of a request that are due: turn/ says which and how, compressor.py does it, publish.py hands the
result to the prefix cache."""

from __future__ import annotations

from typing import Any

from keepkv_sglang.runtime.compressor import compress_span
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.publish import publish_compressed, publish_raw
from keepkv_sglang.runtime.requests import row_of
from keepkv_sglang.turn import plan, queries, spans
from keepkv_sglang.turn.spans import DueSpan, Raw
from keepkv_sglang.turn.state import LOST, Planned, RequestState


def begin_row(rt: Runtime, req: Any, state: RequestState, entry: Any) -> None:
    """A new row is about to be written: plans its spans.

    entry: the matched compressed span of radix/tree.py, or None. Sets the offset on the host only; the caller writes
    it to the device once the row exists.
    """
    chain = None
    if entry is not None:
        rt.counters.entry_hits += 1
        chain = plan.Chain(entry.anchor_len, entry.path_slots, entry.path_tokens, rt.tree.raw_tail_start(entry))
    plan.begin(rt.limits, state, row_of(req), chain)


def plan_chunk(rt: Runtime, req: Any, state: RequestState) -> None:
    """Tokens up to req.extend_end are about to run."""
    plan.plan_chunk(rt.limits, state, req.prefix_len, req.extend_end, rt.requests.too_long(req))


def compress_due(rt: Runtime, req: Any, state: RequestState, *, between_chunks: bool = False) -> bool:
    """Compresses every span of the request that is complete. Returns True when the row became shorter.

    Between chunks only prompts that cannot fit the pool: the others' later chunks see their whole prompt.

    Callers guarantee that the row is settled: every slot up to kv_committed_len is computed or in flight, none
    allocated beyond it.
    """
    before = req.kv.kv_committed_len
    if state.broken or (between_chunks and not rt.requests.too_long(req)):
        return False
    compress_plan(rt, req, state)
    if not state.plan and spans.reply_due(state, req.kv.kv_committed_len):
        _compress_reply(rt, req, state)
    return bool(req.kv.kv_committed_len != before)


def compress_plan(rt: Runtime, req: Any, state: RequestState) -> None:
    """The planned spans whose tokens are computed."""
    while state.plan:
        planned = state.plan[0]
        computed = req.kv.kv_committed_len + state.offset  # both change with every compression
        if planned.end > computed or not _compress_planned(rt, req, state, planned):
            break
        state.plan.pop(0)


def _compress_planned(rt: Runtime, req: Any, state: RequestState, planned: Planned) -> bool:
    """One planned span. False: the pool had no room, try again next round."""
    rt.tree.publish_anchor(req, state.anchor_len)
    due = spans.planned_span(state, planned, req.kv.kv_committed_len)
    if isinstance(due, DueSpan):
        if not compress_span(rt, req, state, due):
            return False
        spans.commit(state, due)
        publish_compressed(rt, req, state, due)
    else:
        publish_raw(rt, req, state, planned.end)  # so that the next turn can take it in
        if due is Raw.CLOSED:
            spans.keep_raw(state, planned.end - state.offset, planned.end, req.kv.cache_protected_len)
    queries.release(rt.limits, planned)
    return True


def _compress_reply(rt: Runtime, req: Any, state: RequestState) -> None:
    """During decode: the raw tail is one interval long."""
    assert state.reply_queries is not None
    if state.reply_queries.filled != LOST:
        due = spans.reply_span(state, req.kv.kv_committed_len)
        if due is None:
            spans.keep_reply(state, req.kv.kv_committed_len, req.kv.cache_protected_len)
        # Without room the tail stays raw; the next set of queries opens at once and tries again when it is full.
        elif compress_span(rt, req, state, due):
            spans.commit(state, due)
            publish_compressed(rt, req, state, due)
    queries.release_reply(rt.limits, state)
