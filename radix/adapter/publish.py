"""How slots become spans of the cache. cache, everywhere here: a KeepKVRadixCache (cache.py)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from keepkv_sglang.radix.adapter.requests import Requests
from keepkv_sglang.radix.marks import marked, plain
from keepkv_sglang.radix.nodes import Scope
from keepkv_sglang.radix.span import Span


def publish_span(
    cache: Any,
    req: Any,
    namespace: tuple[Any, ...],
    tokens: array,
    first: int,
    start: int,
    m: int,
    *,
    raw: bool,
    lookahead: int = 0,
) -> bool:
    """Hands row slots [start, start + m) to the cache as one span below the request's present lock.

    tokens: what the slots stand for, beginning at logical position `first`; the `lookahead` tokens of the request
    behind them had a say in what was kept. An identical span that is already there is adopted: the row is pointed
    at its slots and ours are freed. Returns False when the slots stay private: the request is barred from the
    cache, or a different twin is in the way.
    """
    kv = req.kv
    requests: Requests | None = cache.requests
    if cache.disable or requests is None or req.skip_radix_cache_insert or start != kv.cache_protected_len:
        return False
    state = requests.known_state(req)
    assert state is not None, "only requests with a state have spans"
    parent = req.lock.node if req.lock is not None and isinstance(req.lock.node, Span) else None
    anchor: Any
    if parent is not None:
        anchor, anchor_len = parent.anchor, parent.anchor_len
    else:
        anchor, anchor_len = (req.last_node, start) if start else (None, 0)
    if first != (parent.path_tokens if parent is not None else start):
        # The last line of defence against showing a slot under tokens it does not stand for. Tests assert 0.
        return requests.mispublished(req, f"a span that begins at {first} does not follow its prefix {parent!r}")
    slots = cache.req_to_token_pool.req_to_token[kv.req_pool_idx, start : start + m].to(torch.int64)
    end = first + len(tokens)
    keyed = state.protection.keyed(requests.tokens_of(req)[: end + lookahead])
    prompt, behind = keyed[:end], keyed[end:]
    assert len(behind) == lookahead, (len(keyed), end, lookahead)
    if raw and parent is not None and join_span(cache, parent, prompt, len(tokens), slots):
        kv.cache_protected_len = start + m  # under the lock that the request has
        cache.touch_of(req)
        requests.note_published()
        return True
    span, created = insert_span(cache, parent, anchor, anchor_len, namespace, prompt, len(tokens), slots, raw, behind)
    if not created:
        if (span.n, span.m) != (len(tokens), m):
            return False
        cache.req_to_token_pool.write((kv.req_pool_idx, slice(start, start + m)), span.slots.to(torch.int32))
        cache.token_to_kv_pool_allocator.free(slots)
    cache.move_lock(req, span, start + m)
    cache.touch_of(req)
    if created:
        requests.note_published()
    return True


def insert_span(
    cache: Any,
    parent: Span | None,
    anchor: int | None,
    anchor_len: int,
    namespace: tuple[Any, ...],
    prompt: array,
    n: int,
    slots: torch.Tensor,
    raw: bool,
    lookahead: Sequence[int] = (),
) -> tuple[Span, bool]:
    """Adds the last n tokens of `prompt`, held in `slots`; (span, True) or (the twin that is there, False).

    prompt, and the lookahead behind it: with the marks of what is protected (marks.py).
    """
    span, created = cache.spans.insert(
        parent=parent,
        anchor=anchor,
        anchor_len=anchor_len,
        namespace=namespace,
        tokens=prompt[len(prompt) - n :],
        slots=slots,
        m=len(slots),
        raw=raw,
        lookahead=lookahead,
    )
    if created:
        # What a compression left raw belongs to the next one, not to pressure.
        mergeable = raw and not (parent is not None and n <= parent.lookahead)
        cache.book.added(span, prompt, mergeable)
        _note_covered(cache, span, prompt, lookahead)
    return span, created


def join_span(cache: Any, span: Span, prompt: array, n: int, slots: torch.Tensor) -> bool:
    """Appends the last n tokens of `prompt`, raw in `slots`, to the span that ends where they begin and that only
    the caller may hold; False where they need a span of their own: see SpanTree.can_join and join."""
    own = prompt[len(prompt) - n :]
    if not cache.spans.can_join(span, n) or marked(own) != marked(span.tokens):
        return False
    if not cache.spans.join(span, own, torch.cat([span.slots, slots])):
        return False
    cache.book.joined(span, n)
    _note_covered(cache, span, prompt)
    return True


def _note_covered(cache: Any, span: Span, prompt: array, lookahead: Sequence[int] = ()) -> None:
    """Looks for uncompressed copies of what a span that has grown or is new holds."""
    scope: Scope = span.namespace[:3]  # type: ignore[index]
    below = cache.match_core(plain(prompt), scope)
    if below.device_prefix_len > span.anchor_len:
        tokens = prompt + array("q", lookahead) if lookahead else prompt
        cache.covered.find(cache.path_of(below.last_device_node), tokens, scope)
