"""What of a request's row the prefix cache gets, and the last checks before a slot is shown under a token."""

from __future__ import annotations

from typing import Any

import torch

from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import logical_tokens
from keepkv_sglang.turn.spans import DueSpan, raw_borders
from keepkv_sglang.turn.state import RequestState


def publish_compressed(rt: Runtime, req: Any, state: RequestState, span: DueSpan) -> None:
    """A prompt's span is published at once, so that twins and retries hit it; a reply's stays the request's own, since
    tokens behind a stop may still be taken back. Call after spans.commit."""
    slots = span.closed_slots
    if span.is_prompt:
        tokens = logical_tokens(req)[span.first : span.closed_end]
        rt.tree.publish_span(
            req, state.namespace, tokens, span.first, span.start, slots, raw=False, lookahead=span.left
        )
        if req.kv.cache_protected_len >= span.start + slots:
            publish_raw(rt, req, state, span.end)
            return
    state.own.append((span.closed_end - span.first, slots))


def publish_raw(rt: Runtime, req: Any, state: RequestState, end: int) -> None:
    """Publishes the slots between the cache's part of the row and logical `end` as one raw span."""
    prot = req.kv.cache_protected_len
    if state.own or end - state.offset <= prot:
        return
    first = prot + state.offset
    tokens = logical_tokens(req)[first:end]
    if len(tokens) == end - first and _hold(rt, req, prot, tokens):
        rt.tree.publish_span(req, state.namespace, tokens, first, prot, end - first, raw=True)


def _hold(rt: Runtime, req: Any, start: int, tokens: Any) -> bool:
    """Whether row slots from `start` on are known to hold other tokens than these; then nothing is published."""
    if rt.slot_tokens is None:
        return True
    row = rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start : start + len(tokens)].to(torch.int64)
    return rt.slot_tokens.hold(row, tokens) or rt.requests.mispublished(req, "its slots hold other tokens")


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
    return rt.requests.mispublished(req, f"{computed} tokens computed, {known} known, {in_flight} steps in flight")


def note_end(req: Any, state: RequestState) -> None:
    """The request gives its row back: notes what it held, for its answer."""
    state.logical_tokens = min(req.kv.kv_committed_len + state.offset, len(logical_tokens(req)))
    state.slots_held = state.logical_tokens - state.offset
    state.protected_tokens = state.protection.count(0, state.logical_tokens)


def publish_rest(rt: Runtime, req: Any, state: RequestState, retracted: bool) -> None:
    """The part of a released row that the cache does not have yet; what stays unpublished is freed by SGLang."""
    rt.tree.publish_anchor(req, state.anchor_len)
    if state.own:
        known, start = logical_tokens(req), req.kv.cache_protected_len
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
    for border in raw_borders(state, retracted):
        if border <= state.logical_tokens:
            publish_raw(rt, req, state, border)
