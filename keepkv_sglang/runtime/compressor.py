"""The hub: score -> select -> match -> merge -> commit, for one span of one request. Read this first.

The mathematics of one layer is compress/layer.py, which compress/batch.py gives several layers at once; which span is
due, and when, is decided in turn/spans.py. Here the span's slots are chosen, merged into slots that
are private to the request, and the row is shortened. Nothing shared is rewritten: a slot that the prefix cache owns is
only ever read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from keepkv_sglang.compress.batch import Rows, Storage, compress_rows, scratch_bytes
from keepkv_sglang.compress.layer import LayerResult
from keepkv_sglang.compress.packed import compress_packed, shares_cells
from keepkv_sglang.compress.precision import exact_float32
from keepkv_sglang.compress.queries.references import QuerySample
from keepkv_sglang.compress.registry import SCORERS
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.compress.transfer import on_device
from keepkv_sglang.faults import guard
from keepkv_sglang.runtime import record, stream
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.streams import on_forward_stream
from keepkv_sglang.runtime.watched import PROMPT, REPLY
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.turn.spans import DueSpan
from keepkv_sglang.turn.state import RequestState

logger = logging.getLogger("keepkv")


def compress_span(rt: Runtime, req: Any, state: RequestState, span: DueSpan) -> bool | None:
    """Merges the span's slots of every layer into m of the request's own slots and shortens its row.

    Mutates the KV pool and the votes (only slots that are private to the request or newly allocated), the row, the
    request's lengths, lock and offset. Returns False, with nothing changed, when the pool has no room for it, and
    None, with nothing changed, after an error; raises that where the pool cannot hold the request uncompressed.

    Of the span, row positions below cache_protected_len belong to the prefix cache (raw spans that are compressed with
    this turn, or the whole chain under a budget in slots): they are read, then left to the cache.
    """
    kv = req.kv
    length = kv.kv_committed_len
    assert kv.kv_allocated_len == length, (kv.kv_allocated_len, length)
    assert 0 < span.m < span.sources and span.m <= span.slots and span.queries.filled > 0
    began = time.perf_counter()
    row = rt.req_to_token_pool.req_to_token[kv.req_pool_idx, :length].to(torch.int64)
    stop = span.start + span.slots
    private = row[max(span.start, kv.cache_protected_len) : stop]
    target, spare, taken = private[: span.m], private[span.m :], row[:0]
    if len(private) < span.m:
        extra = allocate(rt, span.m - len(private))
        if extra is None:
            rt.counters.skipped_no_room += 1
            return False
        target, taken = torch.cat([private, extra]), extra
    elif rt.kv_pool.layer_num and rt.allocator.available_size() >= span.m + rt.step_reserve:
        target = taken = rt.allocator.alloc(span.m).to(torch.int64)
        spare = private  # all of them, once the result stands beside them
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        if rt.kv_pool.layer_num:  # the simulator's slots have no contents
            if len(target) > len(taken):
                before = _contents(rt, target)
            reading = stream.reading(rt, req, state, span.first, span.end) if span.originals else None
            queries, tally = _queries(rt, span), _Tally(rt, req, state, span, row[: span.start], target)
            with on_forward_stream(rt.scheduler), exact_float32():
                # Behind the forward in flight, which says of what it writes that it is packed no longer.
                where = _rows(rt, row[: span.start], row[span.start : stop], target, reading)
                for result in _compress(rt, where, queries, span.policy, span.left):
                    tally.add(result)
                tally.finish(state)
    except Exception as error:
        with on_forward_stream(rt.scheduler):
            for pool, content in before:
                pool[target] = content
            if rt.cells is not None:
                rt.cells.reset(target)
        if len(taken):
            rt.allocator.free(taken)
        if rt.requests.too_long(req):
            raise
        guard.note("compression", error)
        return None
    if rt.slot_tokens is not None:
        rt.slot_tokens.forget(target)
    tail = row[stop:]
    new_row = torch.cat([target, tail]).to(torch.int32)
    rt.req_to_token_pool.write((kv.req_pool_idx, slice(span.start, span.start + len(new_row))), new_row)
    if span.start < kv.cache_protected_len:
        rt.tree.move_lock_up(req, span.start)
    new_length = length - span.slots + span.m
    kv.kv_committed_len = kv.kv_allocated_len = new_length
    if len(spare):
        rt.allocator.free(spare)
    rt.set_offset(req, state, state.offset + span.slots - span.m)
    state.compressions += 1
    rt.counters.compressions += 1
    rt.counters.slots_freed += span.slots - span.m
    seconds, kind = time.perf_counter() - began, PROMPT if span.is_prompt else REPLY
    rt.counters.seconds += seconds
    if rt.watched is not None:
        rt.watched.seconds.append((kind, seconds))
    logger.debug(
        "request %s: tokens %d to %d had %d slots and have %d, %s, in %.1f ms",
        req.rid, span.first, span.end, span.slots, span.m, kind, 1e3 * seconds,
    )  # fmt: skip
    return True


def merge_unused(
    rt: Runtime, config: KeepKVConfig, path: torch.Tensor, start: int, end: int, target: torch.Tensor
) -> None:
    """Merges cached slots that no request uses into fresh ones, in every layer.

    path [p] int64: the slots of a cached prefix of `end` tokens; [start, p), one per token, are merged into `target`
    [m] int64, m < p - start. Writes K, V and votes of `target` only. Scored with the calibration's queries behind the
    prefix, normalised over the merged part alone so that the work does not grow with what precedes it; without a
    calibration by the configured scorer if it needs no queries, else by the keys, and then tokens are only kept or
    dropped.
    """
    rows = Rows(path[:0], path[start:], target)
    arena, queries = rt.arena.queries, rt.calibration.queries if rt.calibration is not None else None
    policy = span_policy(config, len(target), sinks=config.sinks if start == 0 else 0)
    if queries is None:
        query_free = not SCORERS.needs_queries(config.scorer)
        policy = replace(policy, merge="evict", scorer=config.scorer if query_free else "keydiff")

    def place(layer: int) -> torch.Tensor:
        return queries.behind(layer, end) if queries is not None else arena[layer, :0]

    count = queries.q.shape[1] if queries is not None else 0
    q_index = torch.full((count,), len(rows.source) - 1, dtype=torch.int64)  # on the CPU: see LayerInput
    with on_forward_stream(rt.scheduler), exact_float32():
        for _ in _compress(rt, rows, (place, arena.shape[2], q_index), policy, 0):
            pass


Queries = tuple[Callable[[int], torch.Tensor], int, torch.Tensor]
"""A layer's queries, their heads, q_index: as compress_rows asks for them."""


def _compress(rt: Runtime, rows: Rows, queries: Queries, policy: SpanPolicy, left: int) -> Iterator[LayerResult]:
    """Merges the span of every layer into rows.target as it is iterated; as a packed span where heads keep different
    numbers of tokens. left: slots at the target's end that are one token each."""
    storage, scratch = _storage(rt), scratch_bytes(rows.target.device)
    if rt.cells is not None:
        rt.cells.reset(rows.target)
        if shares_cells(policy, left):
            return compress_packed(storage, rows, *queries, policy, left, scratch, rt.cells.add)
    return compress_rows(storage, rows, *queries, policy, scratch)


def _rows(rt: Runtime, context: torch.Tensor, source: torch.Tensor, target: torch.Tensor, reading: Any) -> Rows:
    """The row of a span, with the packed spans before it. Of the span itself nothing is packed: only a budget in slots
    merges again what was merged, and it packs nothing."""
    packed = None
    if rt.cells is not None:
        context, packed = rt.cells.of_row(context, source if reading is None else None)
    return Rows(context, source, target, reading, packed)


def allocate(rt: Runtime, count: int) -> torch.Tensor | None:
    """Fresh slots beside the row's own, int64 [count]; evicts cold entries, None when full.

    Leaves what the step being scheduled was promised. While SGLang collects frees, evicting would give nothing.
    """
    if rt.allocator.available_size() + rt.tree.evictable_size() < count + rt.step_reserve:
        return None
    if rt.allocator.available_size() < count:
        if getattr(rt.allocator, "free_group", None) is not None:
            return None
        rt.tree.evict_slots(count - rt.allocator.available_size())
    slots = rt.allocator.alloc(count)
    return None if slots is None else slots.to(torch.int64)


def _contents(rt: Runtime, slots: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(pool, what it holds in these slots), for K, V and votes of every layer: where a span is merged into its own
    slots, for want of others, an error in mid-way would leave the row half merged."""
    storage = _storage(rt)
    with on_forward_stream(rt.scheduler):
        return [(pool, pool[slots]) for pool in (*storage.keys, *storage.values, *storage.log_votes)]


def _storage(rt: Runtime) -> Storage:
    """The pool's layers and their votes."""
    layers = range(rt.first_layer, rt.first_layer + rt.kv_pool.layer_num)
    return Storage(
        [rt.kv_pool.get_key_buffer(layer) for layer in layers],
        [rt.kv_pool.get_value_buffer(layer) for layer in layers],
        rt.votes.log_votes,
        [rt.scales[layer] for layer in layers],
    )


def _queries(rt: Runtime, span: DueSpan) -> Queries:
    """What scores the span."""
    queries, arena = span.queries, rt.arena.queries
    rows = on_device(torch.tensor(queries.rows[: queries.filled], dtype=torch.int64), arena.device)
    positions = list(queries.positions[: queries.filled])
    # The window's tokens are raw, one slot each, so their index in the span is counted from its end.
    sample = QuerySample(positions, queries.references, span.end, span.sources, rt.rotary, arena.dtype, arena.device)
    return lambda layer: sample.place(arena[layer, rows]), arena.shape[2], sample.q_index


class _Tally:
    """What a compression did, over all layers: merged and dropped tokens, and what --keepkv-record asks for."""

    def __init__(
        self, rt: Runtime, req: Any, state: RequestState, span: DueSpan, before: torch.Tensor, target: torch.Tensor
    ) -> None:
        """before: the row's slots in front of the span; target: int64 [m], those that are written."""
        self._target = target
        self._span = span
        self._log = record.begin(rt, req, state, span, before, target)
        self._watched, self._votes = rt.watched, rt.votes
        self._joined: list[torch.Tensor] = []  # per result
        self._heads, self._least, self._most = 0, span.m, span.m

    def add(self, result: LayerResult) -> None:
        """The next layer's, or the next head's."""
        self._joined.append((result.assign >= 0).sum())
        self._heads += len(result.assign)
        slots = result.kept.shape[1]
        self._least, self._most = min(self._least, slots), max(self._most, slots)
        if self._log is not None:
            self._log.add(result)

    def finish(self, state: RequestState) -> None:
        """All is written."""
        joined, heads, m, sources = self._joined, self._heads, self._span.m, self._span.sources
        watched = self._watched
        votes = self._votes.spread(self._target) if watched is not None else None

        def count() -> tuple[float, float]:
            if watched is not None and votes is not None:
                watched.votes.append(votes.tolist())
            merged = int(torch.stack(joined).sum()) / heads - m
            return merged, sources - m - merged

        least, most = state.head_share
        state.head_share = min(least, self._least / m), max(most, self._most / m)
        state.uncounted.append(count)  # the answer asks: here it would wait for the compression
        if self._log is not None:
            self._log.write()
