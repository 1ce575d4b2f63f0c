"""Hooks on the way of a batch to the model: lengths are physical, positions logical."""

from __future__ import annotations

from typing import Any

import torch

from keepkv_sglang import guard, runtime, schedule
from keepkv_sglang.guard import fail_batch, guarded, guarded_around
from keepkv_sglang.hooks import failing
from keepkv_sglang.hooks.scheduler import device_lengths
from keepkv_sglang.radix.span import Span
from keepkv_sglang.request import RequestState


@guarded_around(fail_batch)
def around_prefix_kv_indices(original: Any, batch: Any, req: Any) -> torch.Tensor:
    """AROUND allocation._prefix_kv_indices: a continued row has fewer slots than logical tokens."""
    state = getattr(req, runtime.STATE, None)
    if runtime.active() is None or state is None:
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
    rt = runtime.active()
    if rt is None:
        return original(batch)
    states = []
    for req in batch.reqs:
        state = rt.state_of(req)
        if not req.kv.holds_kv:
            rt.tree.count_hit(req.last_node)
        if state is not None and not req.kv.holds_kv:
            entry = req.last_node if isinstance(req.last_node, Span) and req.prefix_len else None
            schedule.on_extend(rt, req, state, entry)
            rt.active_rows += state.offset != 0
        if state is not None and state.admitted and not state.broken:
            _plan_chunk(rt, req, state)
        states.append(state)
    offsets = [state.offset if state is not None else 0 for state in states]
    if any(offsets):
        device_lengths(batch, offsets)
    result = original(batch)
    assert rt.offsets is not None
    for req, offset in zip(batch.reqs, offsets, strict=True):
        if offset:
            rt.offsets[req.kv.req_pool_idx] = offset
    return result


def _plan_chunk(rt: runtime.Runtime, req: Any, state: RequestState) -> None:
    """Without a plan the request runs uncompressed behind what it matched."""
    try:
        schedule.on_chunk(rt, req, state)
    except Exception as error:
        guard.note("on_chunk", error)
        rt.drop_plan(state)


@guarded(fail_batch)
def after_prepare_for_extend(_result: Any, self: Any) -> None:
    """AFTER ScheduleBatch.prepare_for_extend: it summed the logical lengths."""
    rt = runtime.active()
    if rt is not None and rt.active_rows:
        self.seq_lens_sum = int(self.seq_lens_cpu.sum())


def _fail_compressed(error: Exception, _forward_batch: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """Positions of compressed rows are unknown in this step: their requests fail. The others have no offset."""
    scheduler = runtime.current().scheduler
    for req in batch.reqs:
        state = getattr(req, runtime.STATE, None)
        if state is not None:
            state.broken = True
            failing.fail(scheduler, req, "positions", error)


@guarded(_fail_compressed)
def after_init_new(forward_batch: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER ForwardBatch.init_new: logical positions, and which window queries this forward keeps."""
    rt = runtime.active()
    if rt is None or forward_batch.positions is None or not forward_batch.positions.numel():
        return forward_batch
    decode = forward_batch.forward_mode.is_decode()
    if rt.active_rows:
        assert rt.offsets is not None
        offset = rt.offsets[forward_batch.req_pool_indices]
        if not decode:
            offset = torch.repeat_interleave(
                offset, forward_batch.extend_seq_lens.to(torch.int64), output_size=forward_batch.positions.numel()
            )
        forward_batch.positions = forward_batch.positions + offset
    # Not on the forward batch: SGLang may run a copy of it, made from its declared fields.
    rt.capture = None
    try:
        rt.capture = _capture(rt, batch, forward_batch, decode)
    except Exception as error:
        guard.note("capture", error)
        for req in batch.reqs:
            if (state := getattr(req, runtime.STATE, None)) is not None:
                state.spoil_windows()
    return forward_batch


def _capture(rt: runtime.Runtime, batch: Any, forward_batch: Any, decode: bool) -> Any:
    """(query rows, arena rows) int64 on the device, or None when this forward keeps no queries."""
    wanted: tuple[list[int], list[int]] = ([], [])
    counts = [1] * len(batch.reqs) if decode else batch.extend_lens
    calibration = rt.calibration if not decode else None
    lengths = None
    at = 0
    for index, (req, count) in enumerate(zip(batch.reqs, counts, strict=False)):
        state = getattr(req, runtime.STATE, None)
        if lengths is None:
            lengths = batch.seq_lens_cpu.tolist()
        if state is not None and state.admitted:
            end = lengths[index] + state.offset
            schedule.capture(rt, state, end - count, end, wanted, at)
        elif state is None and calibration is not None and calibration.wants(req):
            assert rt.arena is not None
            calibration.capture(rt.arena, lengths[index] - count, lengths[index], wanted, at)
        at += count
    if not wanted[0]:
        return None
    device = forward_batch.positions.device
    # From pageable memory the copy would wait for the forward in flight.
    rows = torch.tensor(wanted, dtype=torch.int64, pin_memory=device.type == "cuda")
    return rows.to(device, non_blocking=True).unbind()
