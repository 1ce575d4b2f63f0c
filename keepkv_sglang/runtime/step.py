"""What happens between two steps of the scheduler: a batch's due spans are compressed, a row is given back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from keepkv_sglang.faults import guard
from keepkv_sglang.runtime import due
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.publish import counts_agree, note_end, publish_rest
from keepkv_sglang.runtime.requests import known_state
from keepkv_sglang.turn import spans
from keepkv_sglang.turn.state import RequestState

logger = logging.getLogger("keepkv")
Fail = Callable[[Any, str, Exception], None]
"""(request, what failed, error): ends this request alone."""


def compress_batch(rt: Runtime, batch: Any, fail: Fail) -> None:
    """Compresses what is due in a settled batch and rebinds its lengths. Cheap when nothing is due.

    An error that due.py does not turn into an uncompressed request fails that request.
    """
    began = time.perf_counter()
    shorter: dict[int, int] = {}
    rt.counters.most_running = max(rt.counters.most_running, len(batch.reqs))
    rt.step_reserve = rt.limits.running = len(batch.reqs)
    try:
        for index, req, state, whole in _due(rt, batch):
            before = req.kv.kv_committed_len
            try:
                due.compress_due(rt, req, state, whole=whole)
            except Exception as error:
                state.broken = True
                fail(req, "compression", error)
            if req.kv.kv_committed_len != before:
                shorter[index] = req.kv.kv_committed_len
    finally:
        rt.step_reserve = 0
        if shorter:
            _shorten(batch, shorter)
        if (said := rt.skips.look(rt.counters)) is not None:
            logger.warning(said)
        rt.counters.hook_seconds += time.perf_counter() - began


def _due(rt: Runtime, batch: Any) -> Iterator[tuple[int, Any, RequestState, bool]]:
    """(index in the batch, request, state, whether to do all of it) of what is compressed in this step: prompts first,
    then the longest overdue replies, up to `step_tokens` slots. What is left waits for the next step, unless the step
    is short of slots: then nothing waits."""
    found: list[tuple[int, int, int, Any, RequestState, int]] = []
    for index, req in enumerate(batch.reqs):
        state = known_state(req)
        # A finished request's row may be gone already; an overlapped batch still lists it.
        if state is None or not state.admitted or req.finished() or not req.kv.holds_kv:
            continue
        committed = req.kv.kv_committed_len
        if (state.plan or state.reply_queries is not None) and (slots := spans.due_slots(state, committed)):
            waited = committed + state.offset - state.interval_start
            found.append((0 if state.plan else 1, -waited, index, req, state, slots))
    found.sort(key=lambda entry: entry[:3])
    spent = 0
    for rank, _, index, req, state, slots in found:
        short = rt.allocator.available_size() + rt.tree.evictable_size() < 2 * len(batch.reqs)
        if state.compression is not None and state.compression.at == req.kv.kv_committed_len and not short:
            continue  # its next piece comes with its next token
        if rank == 0 and rt.config.piece_tokens:
            slots = min(slots, rt.config.piece_tokens)
        if spent and spent + slots > rt.config.step_tokens and not short:
            rt.counters.deferred += 1
            continue
        spent += slots
        yield index, req, state, short


def _shorten(batch: Any, lengths: dict[int, int]) -> None:
    """Rebinds the lengths of a batch's rows: index -> slots."""
    batch.batch_is_full = False  # SGLang admits nobody while it is set, and clears it only when a request leaves
    rebound = batch.seq_lens_cpu.clone()
    for index, length in lengths.items():
        rebound[index] = length
    # Fresh tensors: batches in flight hold the old ones.
    batch.seq_lens_cpu = rebound
    batch.seq_lens = rebound.to(batch.device, non_blocking=True)
    batch.seq_lens_sum = None


def device_lengths(batch: Any, offsets: list[int]) -> None:
    """Rebinds a batch's lengths from logical to physical. Never mutates tensors that a forward may hold."""
    shift = torch.tensor(offsets, dtype=torch.int64)
    batch.prefix_lens = [length - offset for length, offset in zip(batch.prefix_lens, offsets, strict=True)]
    batch.seq_lens_cpu = batch.seq_lens_cpu - shift
    batch.seq_lens = batch.seq_lens_cpu.to(batch.device, non_blocking=True)


def compress_chunk(rt: Runtime, req: Any, state: RequestState) -> None:
    """Between two chunks of a prompt: spans planned at the chunk's end are due."""
    began = time.perf_counter()
    due.compress_due(rt, req, state, between_chunks=True)
    rt.counters.hook_seconds += time.perf_counter() - began


def release(rt: Runtime, req: Any, state: RequestState, *, publish: bool, retracted: bool) -> None:
    """The request gives its row back: what it held is noted, and the rest of the row published when allowed.

    publish: False for requests that SGLang bars from the cache; what is left unpublished is freed by SGLang.
    """
    began = time.perf_counter()
    try:
        _release(rt, req, state, publish, retracted)
    except Exception as error:
        guard.note("finish", error)  # what is not published yet is freed by SGLang
    rt.counters.retractions_published += retracted and publish
    rt.forget_row(req)
    rt.counters.hook_seconds += time.perf_counter() - began


def _release(rt: Runtime, req: Any, state: RequestState, publish: bool, retracted: bool) -> None:
    publish = publish and not state.broken and counts_agree(rt, req, state)
    if publish:
        due.compress_due(rt, req, state, reply=False)  # one that ends at prefill; the reply is not worth it any more
    note_end(req, state)
    if publish:
        publish_rest(rt, req, state, retracted)
