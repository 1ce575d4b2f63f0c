"""The hub: score -> select -> match -> merge -> commit, for one span of one request. Read this first.

The mathematics of one layer is compress/layer.py, which compress/batch.py gives several layers at once; which span is
due, and when, is decided in turn/spans.py. Here the span's slots are chosen, merged into slots that
are private to the request, and the row is shortened. Nothing shared is rewritten: a slot that the prefix cache owns is
only ever read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from keepkv_sglang.compress.batch import Rows, Storage, row_pieces, scratch_bytes
from keepkv_sglang.compress.layer import LayerResult
from keepkv_sglang.compress.packed import packed_pieces, shares_cells
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


class Outcome(Enum):
    """What became of a span that was due."""

    DONE = "it is compressed"
    NO_ROOM = "nothing has changed: the pool has no room for the result"
    FAILED = "nothing has changed: an error of ours"
    UNFINISHED = "nothing has changed yet: the next piece is due with the request's next token"


@dataclass(eq=False)
class Compression:
    """A span whose result is being computed. Until it is committed, nothing that anybody reads has changed.

    target: int64 [m], where the result goes; taken: those of them that were free before; spare: slots of the row that
    are free afterwards. most_layers: so many are a piece, where it may be computed over several steps. at: the row's
    slots when the last piece was computed.
    """

    rt: Runtime
    state: RequestState
    span: DueSpan
    target: torch.Tensor
    taken: torch.Tensor
    spare: torch.Tensor
    most_layers: float | None = None
    at: int = 0
    seconds: float = 0.0
    before: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    pieces: Iterator[Iterable[LayerResult]] | None = None
    tally: _Tally | None = None

    def left(self, req: Any) -> Iterator[Iterable[LayerResult]]:
        """The pieces that are left."""
        self.at = req.kv.kv_committed_len
        if self.pieces is None:
            # the simulator's slots have no contents
            self.pieces = self._begin(req) if self.rt.kv_pool.layer_num else iter(())
        return self.pieces

    def _begin(self, req: Any) -> Iterator[Iterable[LayerResult]]:
        rt, span = self.rt, self.span
        if len(self.target) > len(self.taken):
            self.before = _contents(rt, self.target)
        stop = span.start + span.slots
        row = rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :stop].to(torch.int64)
        reading = stream.reading(rt, req, self.state, span.first, span.end) if span.originals else None
        # Behind the forward in flight, which says of what it writes that it is packed no longer.
        where = _rows(rt, row[: span.start], row[span.start :], self.target, reading)
        queries = _queries(rt, span)
        self.tally = _Tally(rt, req, self.state, span, row[: span.start], self.target)
        return _compress(rt, where, queries, span.policy, span.left, self.most_layers)

    def add(self, result: LayerResult) -> None:
        """Of a piece."""
        assert self.tally is not None
        self.tally.add(result)

    def drop(self) -> None:
        """It will not be finished: everything is as it was before."""
        self.end()
        rt = self.rt
        with on_forward_stream(rt.scheduler):
            for pool, content in self.before:
                pool[self.target] = content
            if rt.cells is not None:
                rt.cells.reset(self.target)
        if len(self.taken):
            rt.allocator.free(self.taken)

    def end(self) -> None:
        """What it held is the row's now, or free."""
        self.state.compression = None
        self.rt.tree.unfinished_slots -= len(self.taken)


def compress_span(rt: Runtime, req: Any, state: RequestState, span: DueSpan, whole: bool = True) -> Outcome:
    """Merges the span's slots of every layer into m of the request's own slots and shortens its row; with `whole`
    False perhaps only a piece of it, the rest when it is called again.

    Mutates the KV pool and the votes (only slots that are private to the request or newly allocated), the row, the
    request's lengths, lock and offset. After an error it raises that where the pool cannot hold the request
    uncompressed.

    Of the span, row positions below cache_protected_len belong to the prefix cache (raw spans that are compressed with
    this turn, or the whole chain under a budget in slots): they are read, then left to the cache.
    """
    began, job = time.perf_counter(), state.compression
    if job is None and (job := _place(rt, req, state, span, whole)) is None:
        rt.counters.skipped_no_room += 1
        return Outcome.NO_ROOM
    finished = True
    try:
        with on_forward_stream(rt.scheduler), exact_float32():
            for piece in job.left(req):
                for result in piece:
                    job.add(result)
                if job.most_layers and not whole:
                    finished = False
                    break
            if finished and job.tally is not None:
                job.tally.finish(state)
    except Exception as error:
        job.drop()
        if rt.requests.too_long(req):
            raise
        guard.note("compression", error)
        return Outcome.FAILED
    seconds = time.perf_counter() - began
    rt.counters.seconds += seconds
    job.seconds += seconds
    if not finished:
        return Outcome.UNFINISHED
    _commit(rt, req, state, job)
    return Outcome.DONE


def _place(rt: Runtime, req: Any, state: RequestState, span: DueSpan, whole: bool) -> Compression | None:
    """Slots for the result: fresh ones beside the span, else the span's own with as many fresh ones as they lack; None
    where these are not there."""
    kv = req.kv
    length, stop = kv.kv_committed_len, span.start + span.slots
    assert kv.kv_allocated_len == length, (kv.kv_allocated_len, length)
    assert 0 < span.m < span.sources and span.m <= span.slots and span.queries.filled > 0
    row = rt.req_to_token_pool.req_to_token[kv.req_pool_idx, :stop].to(torch.int64)
    private = row[max(span.start, kv.cache_protected_len) :]
    job = Compression(rt, state, span, private[: span.m], row[:0], private[span.m :])
    if len(private) < span.m:
        extra = allocate(rt, span.m - len(private))
        if extra is None:
            return None
        job.target, job.taken = torch.cat([private, extra]), extra
    elif rt.kv_pool.layer_num and rt.allocator.available_size() >= span.m + rt.step_reserve:
        job.target = job.taken = rt.allocator.alloc(span.m).to(torch.int64)
        job.spare = private  # all of them, once the result stands beside them
        piece = rt.config.piece_tokens
        # What overwrites its own span must be done before the next forward reads the row.
        if piece and not whole and span.is_prompt and not span.originals and span.slots > piece:
            job.most_layers = rt.kv_pool.layer_num * piece / span.slots
    rt.tree.unfinished_slots += len(job.taken)
    state.compression = job
    return job


def _commit(rt: Runtime, req: Any, state: RequestState, job: Compression) -> None:
    """The result takes the span's place in the row, whose end may have grown meanwhile."""
    kv, span = req.kv, job.span
    length, stop = kv.kv_committed_len, span.start + span.slots
    assert kv.kv_allocated_len == length, (kv.kv_allocated_len, length)
    job.end()
    if rt.slot_tokens is not None:
        rt.slot_tokens.forget(job.target)
    tail = rt.req_to_token_pool.req_to_token[kv.req_pool_idx, stop:length].to(torch.int64)
    new_row = torch.cat([job.target, tail]).to(torch.int32)
    rt.req_to_token_pool.write((kv.req_pool_idx, slice(span.start, span.start + len(new_row))), new_row)
    if span.start < kv.cache_protected_len:
        rt.tree.move_lock_up(req, span.start)
    kv.kv_committed_len = kv.kv_allocated_len = length - span.slots + span.m
    if len(job.spare):
        rt.allocator.free(job.spare)
    rt.set_offset(req, state, state.offset + span.slots - span.m)
    state.compressions += 1
    rt.counters.compressions += 1
    rt.counters.slots_freed += span.slots - span.m
    kind = PROMPT if span.is_prompt else REPLY
    if rt.watched is not None:
        rt.watched.seconds.append((kind, job.seconds))
    logger.debug(
        "request %s: tokens %d to %d had %d slots and have %d, %s, in %.1f ms",
        req.rid, span.first, span.end, span.slots, span.m, kind, 1e3 * job.seconds,
    )  # fmt: skip


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
        for piece in _compress(rt, rows, (place, arena.shape[2], q_index), policy, 0):
            for _ in piece:
                pass


Queries = tuple[Callable[[int], torch.Tensor], int, torch.Tensor]
"""A layer's queries, their heads, q_index: as compress_rows asks for them."""


def _compress(
    rt: Runtime, rows: Rows, queries: Queries, policy: SpanPolicy, left: int, most_layers: float | None = None
) -> Iterator[Iterable[LayerResult]]:
    """Merges the span of every layer into rows.target as it is iterated, piece by piece; as a packed span where heads
    keep different numbers of tokens. left: slots at the target's end that are one token each."""
    storage, scratch = _storage(rt), scratch_bytes(rows.target.device)
    if rt.cells is not None:
        rt.cells.reset(rows.target)
        if shares_cells(policy, left):
            # A layer is in two pieces: it is scored, and later merged.
            most = None if most_layers is None else max(1, int(2 * most_layers))
            return packed_pieces(storage, rows, *queries, policy, left, scratch, rt.cells.add, most)
    most = None if most_layers is None else max(1, int(most_layers))
    return row_pieces(storage, rows, *queries, policy, scratch, most)


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
