"""Which span of a request is compressed, and when. Timing hooks call in here; the merging itself is compressor.py.

`on_extend` plans when a row is (re)started, `capture` says which queries the attention backend keeps, `compress_due`
compresses what is complete, `finish` hands the rest of the row to the prefix cache.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from typing import Any

import torch

from keepkv_sglang.anchor import first_message_end
from keepkv_sglang.compressor import Span, compress_span, policy_of
from keepkv_sglang.request import LOST, Planned, RequestState, Window, logical_tokens
from keepkv_sglang.runtime import Runtime
from keepkv_sglang.scoring.references import reference_positions
from keepkv_sglang.selection import left_raw

logger = logging.getLogger("keepkv")


def on_extend(rt: Runtime, req: Any, state: RequestState, entry: Any) -> None:
    """A new row is about to be written: take over what was matched and plan the spans of this prefill.

    entry: the matched compressed span of radix/tree.py, or None. Sets the offset on the host only; the caller writes
    it to the device once the row exists.
    """
    state.prompt_tokens = len(req.origin_input_ids)
    total = state.prefill_tokens = len(req.full_untruncated_fill_ids)
    prefix = req.prefix_len
    if entry is not None:
        anchor, slots, tokens = entry.anchor_len, entry.path_slots, entry.path_tokens
        tail = rt.tree.raw_tail_start(entry)
        rt.counters["entry_hits"] += 1
        if state.compressions == 0:
            state.cached_compressed_tokens = tokens - anchor
    else:
        slots = tokens = prefix
        border = first_message_end(req.origin_input_ids, rt.border)
        anchor = max(prefix, min(border, state.reply_start))
        tail = (anchor, anchor, 0)
    state.begin_row(anchor_len=anchor, prefix_tokens=tokens, prefix_slots=slots, tail=tail)
    start = state.counted_tokens
    for end, is_prompt in state.borders(start, total):
        if end <= prefix and end < state.reply_start:
            continue  # inside what was matched: there it need not be a border of a cached span, and no queries come
        # Only tokens computed now have queries: never before the matched prefix, never before this span.
        state.plan.append(Planned(end, max(start, prefix), is_prompt))
        start = end


def on_chunk(rt: Runtime, req: Any, state: RequestState) -> None:
    """Tokens up to req.extend_end are about to run: plan what only this chunk decides, take arena rows.

    A chunk that does not end a span is compressed at its end only when the prompt cannot fit the pool; otherwise the
    size of chunks does not change results (decision 6).
    """
    end = req.extend_end
    # Shorter than min_tokens: it grows with the next chunk.
    early = state.plan and end < state.plan[0].end and end - state.counted_tokens >= state.config.min_tokens
    if early and rt.too_long(req):
        window = _reserve(rt, state, max(req.prefix_len, state.counted_tokens), end, references=True)
        if window is not None:
            state.plan.insert(0, Planned(end, req.prefix_len, is_prompt=True, window=window))
    for planned in state.plan:
        if planned.window is not None or not _starts_in_chunk(rt, req, state, planned, end):
            continue
        if planned.is_prompt or rt.room_for_replies():
            planned.window = _reserve(rt, state, max(planned.first, req.prefix_len), planned.end, planned.is_prompt)


def _starts_in_chunk(rt: Runtime, req: Any, state: RequestState, planned: Planned, end: int) -> bool:
    """Whether queries that the planned span needs come before `end`, the end of the chunk that is about to run."""
    spread = planned.is_prompt and rt.queries_of(state.config) > state.config.window
    # A prompt that is compressed between chunks has references from the chunk that ends it.
    first = planned.first if spread and not rt.too_long(req) else planned.end - state.config.window
    return end > first


def _reserve(rt: Runtime, state: RequestState, first: int, end: int, references: bool) -> Window | None:
    """Arena rows for the last queries before `end`, and for reference queries from `first` on if asked for; None: there
    are none from `first` on, or the arena is full."""
    lo = max(first, end - state.config.window)
    if lo >= end:
        return None
    assert rt.arena is not None
    spread = reference_positions(first, lo, rt.queries_of(state.config) - state.config.window) if references else []
    positions = [*spread, *range(lo, end)]
    # A prompt in many pieces holds a window for each until its end: never more than half of what all requests share.
    held = sum(len(planned.window.rows) for planned in state.plan if planned.window is not None)
    rows = rt.arena.take(len(positions)) if held == 0 or 2 * (held + len(positions)) <= rt.arena.rows else None
    if rows is None:
        rt.counters["skipped_no_window"] += 1
        return None
    return Window(positions, rows, len(spread))


def capture(rt: Runtime, state: RequestState, start: int, end: int, out: tuple[list[int], list[int]], at: int) -> None:
    """Tokens [start, end) (logical) run in this forward, at rows [at, ...) of its query tensor.

    Appends to out (query rows, arena rows) those that a planned or coming compression scores with.
    """
    for planned in state.plan:
        if planned.window is not None:
            _capture_window(planned.window, start, end, out, at)
    if end > state.reply_start:
        _open_reply_window(rt, state, start, end)
        if state.reply_window is not None:
            _capture_window(state.reply_window, start, end, out, at)


def _open_reply_window(rt: Runtime, state: RequestState, start: int, end: int) -> None:
    """Queries of the last tokens before the next compression of the reply; taken as late as possible."""
    if state.reply_window is not None:
        return
    base = state.plan[-1].end if state.plan else state.interval_start  # where what is new will begin
    due = base + state.config.interval
    count = rt.reply_rows(state.config)
    if end <= due - count:
        return
    assert rt.arena is not None
    lo = max(start, due - count)
    rows = rt.arena.take(due - lo if due > lo else count) if rt.room_for_replies() else None
    if rows is not None:
        state.reply_window = Window(range(lo, lo + len(rows)), rows)
    elif state.reply_skipped != due:
        state.reply_skipped = due
        rt.counters["skipped_reply_window"] += 1


def _capture_window(window: Window, start: int, end: int, out: tuple[list[int], list[int]], at: int) -> None:
    lo, hi = bisect_left(window.positions, start), bisect_left(window.positions, end)
    if lo >= hi:
        return
    if lo != window.filled:
        window.filled = LOST
        return
    out[0].extend(at + position - start for position in window.positions[lo:hi])
    out[1].extend(window.rows[lo:hi])
    window.filled = hi


def due_slots(req: Any, state: RequestState) -> int:
    """Slots of the spans that `compress_due` would compress now; 0: nothing is due."""
    if state.broken:
        return 0
    start = _span_start(state)[0]
    computed = req.kv.kv_committed_len + state.offset
    ends = [planned.end for planned in state.plan if planned.end <= computed]
    if ends:
        return max(1, ends[-1] - state.offset - start)
    if state.plan or state.reply_window is None:
        return 0
    window = state.reply_window
    full = window.filled == LOST or window.filled >= len(window.rows)
    return computed - state.offset - start if full and computed >= state.interval_start + state.config.interval else 0


def compress_due(rt: Runtime, req: Any, state: RequestState, *, between_chunks: bool = False) -> bool:
    """Compresses every span of the request that is complete. Returns True when the row became shorter.

    Between chunks only prompts that cannot fit the pool: the others' later chunks see their whole prompt (decision 6).

    Callers guarantee that the row is settled: every slot up to kv_committed_len is computed or in flight, none
    allocated beyond it.
    """
    before = req.kv.kv_committed_len
    if state.broken or (between_chunks and not rt.too_long(req)):
        return False
    _compress_plan(rt, req, state)
    if not state.plan and state.reply_window is not None:
        _compress_reply(rt, req, state)
    return req.kv.kv_committed_len != before


def _compress_plan(rt: Runtime, req: Any, state: RequestState) -> None:
    while state.plan:
        planned = state.plan[0]
        computed = req.kv.kv_committed_len + state.offset  # both change with every compression
        if planned.end > computed or not _compress_planned(rt, req, state, planned):
            break
        state.plan.pop(0)


def _compress_planned(rt: Runtime, req: Any, state: RequestState, planned: Planned) -> bool:
    """One planned span. False: the pool had no room, try again next round."""
    rt.tree.publish_anchor(req, state.anchor_len)
    start_slots, start_tokens = _span_start(state)
    slots = planned.end - state.offset - start_slots
    tokens = planned.end - start_tokens
    m = state.slots_for(start_tokens, planned.end)
    new = tokens if state.config.counts_slots else planned.end - state.counted_tokens
    short = planned.is_prompt and new < state.config.min_tokens
    window = planned.window
    if short and state.carried:
        _publish_raw(rt, req, state, planned.end)  # the tail stays open: the reply's first interval takes it in
    elif short or m >= slots or window is None or window.filled <= 0:
        _close_raw(rt, req, state, planned.end)
    else:
        computed = req.kv.kv_committed_len + state.offset
        followed = planned.is_prompt and planned.end < min(state.reply_start, computed)
        span = Span(start_slots, slots, tokens, planned.end, m, followed)
        left = _left_raw(state, span)
        if not compress_span(rt, req, state, span, window):
            return False
        _commit(rt, req, state, span, left, planned.is_prompt)
    _release_window(rt, planned)
    return True


def _span_start(state: RequestState) -> tuple[int, int]:
    """(slots, tokens) where the next span begins: the raw tail, or the anchor under a budget in slots."""
    if state.config.counts_slots:
        return state.anchor_len, state.anchor_len
    return state.tail_slots, state.tail_tokens


def _close_raw(rt: Runtime, req: Any, state: RequestState, end: int) -> None:
    """The span stays whole: publish it raw, so that the next turn can take it in, and go on behind it."""
    _publish_raw(rt, req, state, end)
    _keep_raw(req, state, end - state.offset, end)


def _keep_raw(req: Any, state: RequestState, slots: int, tokens: int) -> None:
    """The raw tail up to here, (row slots, logical tokens), is closed; what of it is not published stays in front of
    what follows."""
    private = slots - max(req.kv.cache_protected_len, state.tail_slots)
    if private > 0:
        state.own.append((private, private))
    state.move_tail(slots, tokens)


def _left_raw(state: RequestState, span: Span) -> int:
    """How many of the span's last tokens, kept one by one, stay in the raw tail and are compressed with what follows.

    Were they part of it for good, every turn would spend up to half of its slots on an end that was recent once
    (docs/log.md). A budget in slots merges everything again anyway.
    """
    return 0 if state.config.counts_slots else left_raw(policy_of(state, span), span.slots)


def _commit(rt: Runtime, req: Any, state: RequestState, span: Span, left: int, is_prompt: bool) -> None:
    """Account for a compressed span but its last `left` tokens; a prompt's is published at once, so that twins and
    retries hit it."""
    first_token, end, m = span.end - span.tokens, span.end - left, span.m - left
    if state.config.counts_slots:
        state.own = []  # everything past the anchor was merged again, together
    state.move_tail(span.start + m, end, left)
    state.merged_tokens = end
    if is_prompt:
        tokens = logical_tokens(req)[first_token:end]
        rt.tree.publish_span(req, state.namespace, tokens, first_token, span.start, m, raw=False, lookahead=left)
        if req.kv.cache_protected_len >= span.start + m:
            _publish_raw(rt, req, state, span.end)
            return
    state.own.append((end - first_token, m))


def _compress_reply(rt: Runtime, req: Any, state: RequestState) -> None:
    """During decode: merge the raw tail once it is one interval long and its window is full."""
    window = state.reply_window
    assert window is not None
    length = req.kv.kv_committed_len
    end = length + state.offset
    if window.filled == LOST:
        _drop_reply_window(rt, state)
        return
    if end < state.interval_start + state.config.interval or window.filled < len(window.rows):
        return
    start_slots, start_tokens = _span_start(state)
    slots = length - start_slots
    m = state.slots_for(start_tokens, end)
    if m < slots:
        span = Span(start_slots, slots, end - start_tokens, end, m)
        left = _left_raw(state, span)
        # Without room the tail stays raw; the next window opens at once and tries again when it is full.
        if compress_span(rt, req, state, span, window):
            _commit(rt, req, state, span, left, is_prompt=False)
    elif not state.config.counts_slots:
        _keep_raw(req, state, length, end)
    elif not state.own:
        state.tail_tokens = end  # still within the budget in slots: look again after one interval
    _drop_reply_window(rt, state)


def _drop_reply_window(rt: Runtime, state: RequestState) -> None:
    assert rt.arena is not None and state.reply_window is not None
    rt.arena.give_back(state.reply_window.rows)
    state.reply_window = None


def _release_window(rt: Runtime, planned: Planned) -> None:
    if planned.window is not None:
        assert rt.arena is not None
        rt.arena.give_back(planned.window.rows)
        planned.window = None


def _publish_raw(rt: Runtime, req: Any, state: RequestState, end: int) -> None:
    """Publishes the slots between the cache's part of the row and logical `end` as one raw span."""
    prot = req.kv.cache_protected_len
    if state.own or end - state.offset <= prot:
        return
    first = prot + state.offset
    tokens = logical_tokens(req)[first:end]
    if len(tokens) == end - first and _holds(rt, req, prot, tokens):
        rt.tree.publish_span(req, state.namespace, tokens, first, prot, end - first, raw=True)


def _holds(rt: Runtime, req: Any, start: int, tokens: Any) -> bool:
    """Whether row slots from `start` on are known to hold other tokens than these; then nothing is published."""
    if rt.slot_tokens is None:
        return True
    row = rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start : start + len(tokens)].to(torch.int64)
    return rt.slot_tokens.hold(row, tokens) or _mispublished(rt, req, "its slots hold other tokens")


def _mispublished(rt: Runtime, req: Any, why: str) -> bool:
    """False, counted and logged: what would have been published does not agree with what SGLang says."""
    rt.counters["mispublished"] += 1
    logger.error("nothing of request %s is published: %s", req.rid, why)
    return False


def counts_agree(rt: Runtime, req: Any, state: RequestState) -> bool:
    """Whether the row stands for exactly the tokens that SGLang has for the request.

    Every token but the last sampled one is computed, and one more for each step whose result is still to come. A prompt
    in the middle of its prefill has sampled nothing.
    """
    computed = req.kv.kv_committed_len + state.offset
    if computed < state.prefill_tokens:
        return True
    in_flight = sum(req in batch.reqs for batch, _ in getattr(rt.scheduler, "result_queue", ()))
    known = len(req.origin_input_ids) + len(req.output_ids)
    if computed == known - 1 + in_flight:
        return True
    return _mispublished(rt, req, f"{computed} tokens computed, {known} known, {in_flight} steps in flight")


def finish(rt: Runtime, req: Any, state: RequestState, publish: bool, retracted: bool) -> None:
    """The request gives its row back: note what it held, and publish the rest of the row when allowed.

    publish is False for requests that SGLang bars from the cache; what is left unpublished is freed by SGLang. The raw
    tail of a retracted request is not published: computing it again gives its next compression a full window.
    """
    publish = publish and not state.broken and counts_agree(rt, req, state)
    if publish:
        _compress_plan(rt, req, state)  # a request that ends at prefill; the reply is not worth it any more
    length = req.kv.kv_committed_len
    known = logical_tokens(req)
    state.logical_tokens = min(length + state.offset, len(known))
    state.slots_held = state.logical_tokens - state.offset
    state.protected_tokens = state.protection.count(0, state.logical_tokens)
    if not publish:
        return
    rt.tree.publish_anchor(req, state.anchor_len)
    if state.own:
        start = req.kv.cache_protected_len
        tokens, slots = sum(t for t, _ in state.own), sum(m for _, m in state.own)
        first = state.tail_tokens - tokens
        if state.counted_tokens > len(known) or start + slots != state.tail_slots:
            return  # a token past the stop was merged or had a say in it, or the row was not published before it
        rt.tree.publish_span(
            req,
            state.namespace,
            known[first : state.tail_tokens],
            first,
            start,
            slots,
            raw=tokens == slots,
            lookahead=state.carried,
        )
        if req.kv.cache_protected_len < start + slots:
            return
        state.own = []
    end = state.logical_tokens
    # A prompt that stayed raw and its reply are two entries; what a compression left raw is one.
    borders = [state.counted_tokens] if state.carried else []
    if not borders or state.reply_start not in range(state.tail_tokens, state.counted_tokens):
        borders.append(state.reply_start)
    for border in [*sorted(borders), *([] if retracted else [end])]:
        if border <= end:
            _publish_raw(rt, req, state, border)
