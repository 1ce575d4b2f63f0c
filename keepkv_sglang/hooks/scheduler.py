"""Scheduler hooks: start-up, and the moments at which a row may be compressed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from keepkv_sglang import flags, guard, refuse, runtime, schedule, seams
from keepkv_sglang.guard import guarded, guarded_around
from keepkv_sglang.hooks import failing
from keepkv_sglang.request import RequestState


def around_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND Scheduler.__init__: the runtime exists before SGLang builds its pools and is complete after."""
    server_args = kwargs.get("server_args", args[0] if args else None)
    rt = runtime.start(flags.config_of(server_args))
    if rt.config.enabled:
        seams.require()  # this process too: SGLang swallows the failure of a hook
    original(self, *args, **kwargs)
    if rt.config.enabled:
        refuse.check_model(self.model_config)
        rt.attach_scheduler(self)


@guarded()
def before_update_running_batch(self: Any, batch: Any) -> None:
    """BEFORE Scheduler.update_running_batch: the saving counts in the decode memory check."""
    compress_batch(batch)


@guarded()
def before_prepare_for_decode(self: Any) -> None:
    """BEFORE ScheduleBatch.prepare_for_decode: mixed chunks decode without update_running_batch."""
    compress_batch(self)


def compress_batch(batch: Any) -> None:
    """Compresses what is due in a settled batch and rebinds its lengths. Cheap when nothing is due.

    An error while one request is compressed fails that request; its slots may be half merged.
    """
    rt = runtime.active()
    if rt is None:
        return
    began = time.perf_counter()
    shorter: dict[int, int] = {}
    rt.counters["most_running"] = max(rt.counters["most_running"], len(batch.reqs))
    rt.step_reserve = rt.running = len(batch.reqs)
    try:
        for index, req, state in _due(rt, batch):
            before = req.kv.kv_committed_len
            try:
                schedule.compress_due(rt, req, state)
            except Exception as error:
                state.broken = True
                failing.fail(rt.scheduler, req, "compression", error)
            if req.kv.kv_committed_len != before:
                shorter[index] = req.kv.kv_committed_len
    finally:
        rt.step_reserve = 0
        if shorter:
            _shorten(batch, shorter)
        rt.counters["hook_seconds"] += time.perf_counter() - began


def _due(rt: runtime.Runtime, batch: Any) -> Iterator[tuple[int, Any, RequestState]]:
    """(index in the batch, request, state) of what is compressed in this step: prompts first, then the longest overdue
    replies, up to `step_tokens` slots. What is left waits for the next step, unless the step is short of slots."""
    found: list[tuple[int, int, int, Any, int]] = []
    for index, req in enumerate(batch.reqs):
        state = getattr(req, runtime.STATE, None)
        # A finished request's row may be gone already; an overlapped batch still lists it.
        if state is None or not state.admitted or req.finished() or not req.kv.holds_kv:
            continue
        if (state.plan or state.reply_window is not None) and (slots := schedule.due_slots(req, state)):
            waited = req.kv.kv_committed_len + state.offset - state.interval_start
            found.append((0 if state.plan else 1, -waited, index, req, slots))
    found.sort(key=lambda entry: entry[:3])
    spent = 0
    for _, _, index, req, slots in found:
        enough = rt.allocator.available_size() + rt.tree.evictable_size() >= 2 * len(batch.reqs)
        if spent and spent + slots > rt.config.step_tokens and enough:
            rt.counters["deferred"] += 1
            continue
        spent += slots
        yield index, req, getattr(req, runtime.STATE)


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


def _fail_chunked(error: Exception, _result: Any, self: Any, req: Any) -> None:
    if (state := getattr(req, runtime.STATE, None)) is not None:
        state.broken = True
    failing.fail(self, req, "compression between chunks", error)


@guarded(_fail_chunked)
def after_stash_chunked_request(_result: Any, self: Any, req: Any) -> None:
    """AFTER Scheduler.stash_chunked_request: spans planned at this chunk's end are due."""
    rt = runtime.active()
    state = getattr(req, runtime.STATE, None)
    if rt is not None and state is not None and state.admitted and req.kv.holds_kv:
        began = time.perf_counter()
        schedule.compress_due(rt, req, state, between_chunks=True)
        rt.counters["hook_seconds"] += time.perf_counter() - began


def _forget_row(_error: Exception, req: Any, *_args: Any, **_kwargs: Any) -> None:
    if (rt := runtime.active()) is not None:
        rt.forget_row(req)


@guarded_around(_forget_row)
def around_release(original: Any, req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    """AROUND release_kv_cache: publish what the row holds, then let SGLang free the rest.

    A retraction publishes too: its entries are evictable at once, and long prompts would otherwise be computed again
    and again under pressure.
    """
    rt = runtime.active()
    state = getattr(req, runtime.STATE, None)
    if rt is not None and state is not None and state.admitted and req.kv.holds_kv:
        retracted = not req.finished() and req.to_finish is None
        began = time.perf_counter()
        # While the engine is paused the weights may change: what is retracted then must be computed again.
        paused = bool(getattr(rt.scheduler, "_engine_paused", False))
        publish = (checkpoint or (retracted and not paused)) and not req.skip_radix_cache_insert
        try:
            schedule.finish(rt, req, state, publish, retracted)
        except Exception as error:
            guard.note("finish", error)  # what is not published yet is freed by SGLang
        rt.counters["retractions_published"] += retracted and publish
        rt.forget_row(req)
        rt.counters["hook_seconds"] += time.perf_counter() - began
    if rt is not None and state is None and rt.calibration is not None and rt.calibration.wants(req):
        assert rt.arena is not None
        rt.calibration.finish(rt.arena)
    original(req, tree_cache, checkpoint=checkpoint)


def after_on_idle(_result: Any, self: Any) -> None:
    """AFTER Scheduler.on_idle: with KEEPKV_CHECK=1, every invariant of the cache, each time something has changed."""
    rt = runtime.active()
    if rt is None or not rt.check_at_idle or not self.is_fully_idle() or rt.checked_at == rt.tree.spans.now:
        return
    rt.checked_at = rt.tree.spans.now
    rt.tree.check()


@guarded()
def after_get_internal_state(result: Any, self: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER Scheduler.get_internal_state: our numbers in /server_info."""
    rt = runtime.active()
    if rt is not None:
        result.internal_state["keepkv"] = {**rt.snapshot(), "errors": dict(guard.errors)}
    return result


def after_get_output_streamer_class(cls: Any, self: Any) -> Any:
    """AFTER Scheduler.get_output_streamer_class: meta_info["keepkv"] with the last output of a request."""
    config = runtime.configured()
    if config is None or not config.enabled:
        return cls

    class KeepKVOutputStreamer(cls):
        __slots__ = ()
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list]:
            info = dict(super().build_additional_customized_info(reqs))
            if any(req.finished() for req in reqs):
                info["keepkv"] = [[_info(req)] if req.finished() else [] for req in reqs]
            return info

    return KeepKVOutputStreamer


@guarded(lambda error, *_: {"enabled": False, "reason": f"unknown: {type(error).__name__}"})
def _info(req: Any) -> dict[str, Any]:
    rt = runtime.current()
    state = rt.state_of(req)
    if state is not None:
        return state.info()
    # The last sampled token has no slot yet, as in RequestState.info.
    return rt.not_compressed(req).info(len(req.origin_input_ids) + max(0, len(req.output_ids) - 1))


def device_lengths(batch: Any, offsets: list[int]) -> None:
    """Rebinds a batch's lengths from logical to physical. Never mutates tensors that a forward may hold."""
    shift = torch.tensor(offsets, dtype=torch.int64)
    batch.prefix_lens = [length - offset for length, offset in zip(batch.prefix_lens, offsets, strict=True)]
    batch.seq_lens_cpu = batch.seq_lens_cpu - shift
    batch.seq_lens = batch.seq_lens_cpu.to(batch.device, non_blocking=True)
