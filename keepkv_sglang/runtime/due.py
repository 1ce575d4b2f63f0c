"""Compresses the spans of a request that are due: turn/ says which and how, compressor.py does it, publish.py hands the
result to the prefix cache."""

from __future__ import annotations

from typing import Any

from keepkv_sglang.runtime import stream, unpack
from keepkv_sglang.runtime.compressor import Outcome, compress_span
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.publish import publish_compressed, publish_raw
from keepkv_sglang.runtime.requests import row_of
from keepkv_sglang.turn import plan, queries, spans
from keepkv_sglang.turn.spans import DueSpan, Raw
from keepkv_sglang.turn.state import RequestState


def begin_row(rt: Runtime, req: Any, state: RequestState, entry: Any) -> None:
    """A new row is about to be written: plans its spans.

    entry: the matched compressed span of radix/tree.py, or None. Sets the offset on the host only; the caller writes
    it to the device once the row exists.
    """
    chain = None
    if (unpacking := unpack.pending(rt, state)) is not None:
        anchor = plan.anchor_of(rt.limits, state, row_of(req), unpacking.start)
        chain = plan.Chain.of_originals(anchor, unpacking.end, unpacking.end - unpacking.start, unpacking.known)
    elif entry is not None:
        rt.counters.entry_hits += 1
        unpacked, known = stream.begin(rt, state)
        tail = rt.tree.raw_tail_start(entry)
        chain = plan.Chain(entry.anchor_len, entry.path_slots, entry.path_tokens, tail, unpacked, unpacked > 0, known)
    plan.begin(rt.limits, state, row_of(req), chain)


def plan_chunk(rt: Runtime, req: Any, state: RequestState) -> None:
    """Tokens up to req.extend_end are about to run."""
    plan.plan_chunk(rt.limits, state, req.prefix_len, req.extend_end, rt.requests.too_long(req))


def compress_due(
    rt: Runtime, req: Any, state: RequestState, *, between_chunks: bool = False, reply: bool = True, whole: bool = True
) -> None:
    """Compresses every span of the request that is complete: planned ones, then the reply's raw tail if `reply`.

    Between chunks only prompts that cannot fit the pool: the others' later chunks see their whole prompt. Without
    `whole` of a long prompt only a piece (--keepkv-piece-tokens), one for each token that it generates: how many that
    are depends on nobody else.

    Callers guarantee that the row is settled: every slot up to kv_committed_len is computed or in flight, none
    allocated beyond it.
    """
    if state.broken or (between_chunks and not rt.requests.too_long(req)):
        return
    kv = req.kv  # committed length and offset change with every compression
    while state.plan and state.plan[0].end <= kv.kv_committed_len + state.offset:
        job = state.compression
        if job is None:
            rt.tree.publish_anchor(req, state.anchor_len)
        span = job.span if job is not None else spans.planned_span(state, state.plan[0], kv.kv_committed_len)
        if isinstance(span, DueSpan):
            if job is None:
                unpack.archive(rt, req, state, span.end)
            outcome = compress_span(rt, req, state, span, whole)
            if outcome is Outcome.UNFINISHED:
                return
            if outcome is Outcome.FAILED:
                return _give_up(rt, state)
            if outcome is Outcome.DONE:
                _note_compressed(rt, req, state, span)
            elif state.streamed:
                stream.end(rt, state)
                continue
            else:
                break  # no room: it is tried again in the next round
        elif state.streamed:
            stream.end(rt, state)
            continue
        else:
            _keep_planned(rt, req, state, span)
        queries.release(rt.limits, state.plan.pop(0))
    if not reply or state.plan or not spans.reply_due(state, kv.kv_committed_len):
        return
    span = spans.reply_span(state, kv.kv_committed_len)
    if span is Raw.CLOSED:
        unpack.archive(rt, req, state, kv.kv_committed_len + state.offset)
        spans.keep_reply(state, kv.kv_committed_len, kv.cache_protected_len)
    elif isinstance(span, DueSpan):
        unpack.archive(rt, req, state, span.end)
        outcome = compress_span(rt, req, state, span)
        if outcome is Outcome.FAILED:
            return _give_up(rt, state)
        if outcome is Outcome.DONE:
            _note_compressed(rt, req, state, span)
    # Without room or queries the tail stays raw; the next set of queries opens at once and tries again when it is full.
    queries.release_reply(rt.limits, state)


def _give_up(rt: Runtime, state: RequestState) -> None:
    """After an error of ours: the request goes on as it is, and nothing more of it is compressed or published."""
    state.broken = True
    if state.streamed:
        stream.end(rt, state)
    queries.drop_plan(rt.limits, state)


def _note_compressed(rt: Runtime, req: Any, state: RequestState, span: DueSpan) -> None:
    spans.commit(state, span)
    if rt.originals is not None:
        rt.originals.packed(state)
    publish_compressed(rt, req, state, span)


def _keep_planned(rt: Runtime, req: Any, state: RequestState, kept: Raw) -> None:
    """The first planned span is not compressed. It is published, so that the next turn can take it in."""
    end = state.plan[0].end
    if kept is Raw.CLOSED:
        unpack.archive(rt, req, state, end)
    publish_raw(rt, req, state, end)
    if kept is Raw.CLOSED:
        spans.keep_raw(state, end - state.offset, end, req.kv.cache_protected_len)
