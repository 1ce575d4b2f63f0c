"""Hooks on the way of a batch to the model: lengths are physical, positions logical."""

from __future__ import annotations

from typing import Any

import torch

from keepkv_sglang.faults import guard
from keepkv_sglang.faults.guard import fail_batch, guarded, guarded_around
from keepkv_sglang.hooks import failing
from keepkv_sglang.radix.span import Span
from keepkv_sglang.runtime import due, process, stream, unpack
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import known_state
from keepkv_sglang.runtime.step import device_lengths
from keepkv_sglang.turn.queries import capture, drop_plan
from keepkv_sglang.turn.state import RequestState


@guarded_around(fail_batch)
def around_prefix_kv_indices(original: Any, batch: Any, req: Any) -> torch.Tensor:
    """AROUND allocation._prefix_kv_indices: a continued row has fewer slots than logical tokens."""
    state = known_state(req)
    if process.active() is None or state is None:
        return original(batch, req)
    if req.kv.holds_kv:
        row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        return row[: req.prefix_len - state.offset].to(torch.int64)
    if req.prefix_len == 0:
        return original(batch, req)
    return batch.tree_cache.prefix_device_indices(req)


@guarded_around(fail_batch)
def around_alloc_for_extend(original: Any, batch: Any) -> Any:
    """AROUND allocation.alloc_for_extend: start rows of new requests, hand physical lengths to the allocation."""
    rt = process.active()
    if rt is None:
        return original(batch)
    states = []
    for req in batch.reqs:
        state = rt.requests.state_of(req)
        if not req.kv.holds_kv:
            rt.tree.count_hit(req.last_node)
        if state is not None and not req.kv.holds_kv:
            entry = req.last_node if isinstance(req.last_node, Span) and req.prefix_len else None
            due.begin_row(rt, req, state, entry)
            rt.active_rows += state.offset != 0
        if state is not None and state.admitted and not state.broken:
            _plan_chunk(rt, req, state)
        states.append(state)
    offsets = [state.offset if state is not None else 0 for state in states]
    if any(offsets):
        device_lengths(batch, offsets)
    result = original(batch)
    for req, state, offset in zip(batch.reqs, states, offsets, strict=True):
        if offset:
            rt.offsets[req.kv.req_pool_idx] = offset
        if state is not None:
            unpack.settle(rt, state)
    return result


def _plan_chunk(rt: Runtime, req: Any, state: RequestState) -> None:
    """Without a plan the request runs uncompressed behind what it matched."""
    try:
        due.plan_chunk(rt, req, state)
    except Exception as error:
        guard.note("plan_chunk", error)
        drop_plan(rt.limits, state)


@guarded(fail_batch)
def after_prepare_for_extend(_result: Any, self: Any) -> None:
    """AFTER ScheduleBatch.prepare_for_extend: it summed the logical lengths."""
    rt = process.active()
    if rt is not None and rt.active_rows:
        self.seq_lens_sum = int(self.seq_lens_cpu.sum())


def _fail_compressed(error: Exception, _forward_batch: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """Positions of compressed rows are unknown in this step: their requests fail. The others have no offset."""
    scheduler = process.current().scheduler
    for req in batch.reqs:
        state = known_state(req)
        if state is not None:
            state.broken = True
            failing.fail(scheduler, req, "positions", error)


@guarded(_fail_compressed)
def after_init_new(forward_batch: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER ForwardBatch.init_new: logical positions, and which window queries this forward keeps."""
    rt = process.active()
    if rt is None or forward_batch.positions is None or not forward_batch.positions.numel():
        return forward_batch
    decode = forward_batch.forward_mode.is_decode()
    if rt.active_rows:
        offset = rt.offsets[forward_batch.req_pool_indices]
        if not decode:
            offset = torch.repeat_interleave(
                offset, forward_batch.extend_seq_lens.to(torch.int64), output_size=forward_batch.positions.numel()
            )
        forward_batch.positions = forward_batch.positions + offset
    # Not on the forward batch: SGLang may run a copy of it, made from its declared fields.
    rt.capture = None
    rt.voted = decode or any(state.offset for req in batch.reqs if (state := known_state(req)) is not None)
    rt.readings = [] if decode else _readings(rt, batch)
    try:
        rt.capture = _capture(rt, batch, forward_batch, decode)
    except Exception as error:
        guard.note("capture", error)
        for req in batch.reqs:
            if (state := known_state(req)) is not None:
                state.spoil_queries()
    return forward_batch


def _readings(rt: Runtime, batch: Any) -> Any:
    """Without them a prompt is read over its compressed match."""
    try:
        return stream.readings(rt, batch)
    except Exception as error:
        guard.note("unpack", error)
        return []


def _capture(rt: Runtime, batch: Any, forward_batch: Any, decode: bool) -> Any:
    """(query rows, arena rows) int64 on the device, or None when this forward keeps no queries."""
    wanted: tuple[list[int], list[int]] = ([], [])
    counts = [1] * len(batch.reqs) if decode else batch.extend_lens
    calibration = rt.calibration if not decode else None
    lengths = None
    at = 0
    for index, (req, count) in enumerate(zip(batch.reqs, counts, strict=False)):
        state = known_state(req)
        if lengths is None:
            lengths = batch.seq_lens_cpu.tolist()
        if state is not None and state.admitted:
            end = lengths[index] + state.offset
            capture(rt.limits, state, end - count, end, wanted, at)
        elif state is None and calibration is not None and calibration.wants(req):
            calibration.capture(rt.arena, lengths[index] - count, lengths[index], wanted, at)
        at += count
    if not wanted[0]:
        return None
    device = forward_batch.positions.device
    # From pageable memory the copy would wait for the forward in flight.
    rows = torch.tensor(wanted, dtype=torch.int64, pin_memory=device.type == "cuda")
    return rows.to(device, non_blocking=True).unbind()
