"""A history that finds no slots for its originals is read from host memory, one layer at a time.

To SGLang the request continues its compressed match: row, lock and accounting are those of a request without originals.
Two readers look elsewhere: attention while the prompt is computed (backend/cpu.py), and the compression behind it
(runtime/compressor.py), which makes one span of history and turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keepkv_sglang.compress.transfer import on_device
from keepkv_sglang.radix.marks import whole_in
from keepkv_sglang.radix.span import Span
from keepkv_sglang.runtime.originals import Originals
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import known_state, row_of
from keepkv_sglang.turn.plan import anchor_of
from keepkv_sglang.turn.state import RequestState

View = tuple[int, Any, int, Any, int]
"""prefix_len, last_node, host_hit_length, best_match_node, cache_protected_len of SGLang's request."""


@dataclass(eq=False)
class Stream:
    """A request from admission until history and turn are compressed.

    view: the match that it replaces (view_of). start: tokens [0, start) are the anchor. tokens: the row continues
    these. archived: tokens [start, archived) are read from the blocks that end with `last`; those from there on have a
    slot each in the row. known: where the last compression ended. protected: (tokens, slots) int64, what of the
    archived part is read from a slot instead.
    """

    view: View
    start: int
    tokens: int
    archived: int
    last: Span
    known: int
    protected: tuple[torch.Tensor, torch.Tensor]


def propose(rt: Runtime, req: Any, state: RequestState, last: Span | None, known: int) -> bool:
    """At admission, when slots for the history's originals cannot be had: whether it is to be streamed. last: the block
    that ends the archived part. known: where the last compression ended. Decided by counts alone."""
    originals, node = rt.originals, req.last_node
    assert originals is not None
    if originals.staging is None or last is None or not isinstance(node, Span):
        return False
    prompt = len(req.full_untruncated_fill_ids)
    queries = rt.limits.queries_of(state.config)
    entry = _with_queries(node, prompt - 1, queries, queries + state.config.interval)
    start, tokens = entry.anchor_len, entry.path_tokens
    if anchor_of(rt.limits, state, row_of(req), start) != start:
        return False
    if prompt > originals.staging.tokens or rt.limits.too_long(prompt - tokens):
        return False
    archived = min(last.path_tokens, tokens)
    if archived <= start:
        return False
    exact = originals.store.exact
    protected = protected_slots(entry, start, start if exact else archived)
    view = view_of(req)
    originals.streams[state] = Stream(view, start, tokens, archived, last, known, protected)
    originals.hold(state, last)
    req.last_node = req.best_match_node = entry
    req.prefix_len, req.host_hit_length, req.kv.cache_protected_len = tokens, 0, entry.path_slots
    state.streamed = True
    return True


def give_up(rt: Runtime, req: Any, state: RequestState) -> None:
    """The request was not admitted: its match is its prefix again. Safe to call when nothing was proposed."""
    if rt.originals is None:
        return
    stream: Stream | None = rt.originals.streams.pop(state, None)
    if stream is not None and not state.admitted:
        give_view(req, stream.view)
        rt.originals.release(state)
        state.streamed = False


def view_of(req: Any) -> View:
    """What a request matched."""
    return req.prefix_len, req.last_node, req.host_hit_length, req.best_match_node, req.kv.cache_protected_len


def give_view(req: Any, view: View) -> None:
    """The request has matched that again."""
    req.prefix_len, req.last_node, req.host_hit_length, req.best_match_node, req.kv.cache_protected_len = view


def pending(rt: Runtime, state: RequestState) -> Stream | None:
    """What is streamed, from admission on."""
    return rt.originals.streams.get(state) if rt.originals is not None else None


def begin(rt: Runtime, state: RequestState) -> tuple[int, int]:
    """Its row begins: (tokens that are streamed, where the last compression ended); 0: none."""
    stream = pending(rt, state)
    if stream is None:
        return 0, 0
    rt.originals.index.touch(stream.last, hit=True)  # type: ignore[union-attr]
    rt.counters.streamed += 1
    rt.counters.streamed_tokens += stream.tokens - stream.start
    return stream.tokens - stream.start, stream.known


def end(rt: Runtime, state: RequestState) -> None:
    """Its history cannot be compressed again: the request goes on behind its compressed match."""
    assert rt.originals is not None
    rt.originals.streams.pop(state, None)
    state.read_compressed()


class Reading:
    """Tokens [begin, end) of a streamed request, one layer after the other, in the staging buffer.

    row: int64, its slots. offset: its tokens less its slots. begin: 0, or where the anchor ends.
    """

    def __init__(
        self, originals: Originals, stream: Stream, row: torch.Tensor, offset: int, begin: int, end: int
    ) -> None:
        assert originals.staging is not None and begin in (0, stream.start) and end >= stream.archived
        self.staging, self._originals, self.tokens = originals.staging, originals, end - begin
        archived, first = stream.archived, 1 - begin  # token i of the text lies in the buffer's row first + i
        slots = torch.cat([row[begin : stream.start], row[archived - offset : end - offset]])
        rows = torch.cat([torch.arange(begin, stream.start), torch.arange(archived, end)]) + first
        self._slots = [(rows, slots)]
        if len(stream.protected[0]):
            self._slots.append((stream.protected[0] + first, stream.protected[1]))
        blocks, counts, where = originals.cut(
            stream.last, stream.start, torch.arange(stream.start + first, archived + first)
        )
        self._blocks = torch.tensor(blocks, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64), where

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [tokens, kv heads, D] of the pool's index-th layer, until the next call."""
        keys, values = self.staging.keys, self.staging.values
        blocks, counts, where = self._blocks
        self._originals.store.read_layer(index, blocks, counts, keys, values, where)
        for rows, slots in self._slots:
            keys.index_copy_(0, rows, self._originals.keys[index].index_select(0, slots))
            values.index_copy_(0, rows, self._originals.values[index].index_select(0, slots))
        return keys[1 : 1 + self.tokens], values[1 : 1 + self.tokens]


def reading(rt: Runtime, req: Any, state: RequestState, begin: int, end: int) -> Reading:
    """Of a request whose row has slots for all tokens up to `end` that its compressed match does not stand for."""
    originals = rt.originals
    assert originals is not None
    row = rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : end - state.offset].to(torch.int64)
    return Reading(originals, originals.streams[state], row, state.offset, begin, end)


def readings(rt: Runtime, batch: Any) -> list[tuple[int, int, Reading]]:
    """Of a prefill batch: (first row of its queries, their number, what they attend to) of each streamed request."""
    if rt.originals is None or not rt.originals.streams:
        return []
    made, at = [], 0
    for req, count, length in zip(batch.reqs, batch.extend_lens, batch.seq_lens_cpu.tolist(), strict=True):
        state = known_state(req)
        if state is not None and state.admitted and state.streamed:
            made.append((at, count, reading(rt, req, state, 0, length + state.offset)))
        at += count
    return made


def protected_slots(entry: Span, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Protected tokens of [start, end), and where the chain has them as they were computed: (tokens, slots) int64. A
    compressed span has them first, a raw one each in its place."""
    tokens, slots = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for span in entry.path() if end > start else ():
        first = span.path_tokens - span.n
        whole = whole_in(span.tokens)
        places = whole if span.raw else range(len(whole))
        pairs = [(first + i, at) for at, i in zip(places, whole, strict=True) if start <= first + i < end]
        if pairs:
            these, those = (torch.tensor(part) for part in zip(*pairs, strict=True))
            tokens.append(these)
            slots.append(span.slots[on_device(those, span.slots.device)].to(torch.int64))
    return torch.cat(tokens), torch.cat([x.to(slots[-1].device) for x in slots])


def _with_queries(entry: Span, end: int, wanted: int, most: int) -> Span:
    """Where a prompt that goes on to `end` leaves fewer than `wanted` queries, raw spans at the end of the chain are
    computed again, no more than `most` tokens in all."""
    while entry.raw and entry.parent is not None and end - entry.path_tokens < wanted:
        if end - entry.parent.path_tokens > most:
            break
        entry = entry.parent
    return entry
