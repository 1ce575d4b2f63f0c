"""Scheduler hooks: start-up, and the moments at which a row may be compressed."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from keepkv_sglang.faults.guard import guarded, guarded_around
from keepkv_sglang.hooks import failing, metrics
from keepkv_sglang.observe.snapshot import memory
from keepkv_sglang.runtime import attach, process, step
from keepkv_sglang.runtime.contents import check_contents
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import known_state
from keepkv_sglang.start import flags, refuse, seams

logger = logging.getLogger("keepkv")


def around_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND Scheduler.__init__: the runtime exists before SGLang builds its pools and is complete after."""
    server_args = kwargs.get("server_args", args[0] if args else None)
    rt = process.start(flags.config_of(server_args))
    if rt.config.enabled:
        seams.require()  # this process too: SGLang swallows the failure of a hook
    original(self, *args, **kwargs)
    if rt.config.enabled:
        refuse.check_server_args(self.server_args)  # as SGLang resolved them meanwhile
        refuse.check_model(self.model_config)
        attach.scheduler(rt, self)
        raise_limits(rt, self)
        metrics.start(rt, self)
        _log_start(rt)


def raise_limits(rt: Runtime, scheduler: Any) -> None:
    """Allows prompts up to the context length, where they can be compressed in chunks. SGLang refuses prompts that are
    longer than the pool at four places, all counting logical tokens; admission.py refuses what would not fit even
    compressed."""
    limits = rt.limits
    limits.capacity = int(scheduler.max_total_num_tokens)
    # With auto-truncation the user asked for cutting prompts at SGLang's limit instead.
    if not limits.chunk_tokens or rt.tree.disable or scheduler.server_args.allow_auto_truncate:
        return
    slack = scheduler.max_req_len - scheduler.max_req_input_len
    limits.pool_limit = limits.capacity - 1 - slack
    scheduler.max_req_len = max(scheduler.max_req_len, scheduler.model_config.context_len - 1)
    scheduler.max_req_input_len = scheduler.max_req_len - slack


def _log_start(rt: Runtime) -> None:
    used = memory(rt)
    logger.info(
        "KeepKV is on: %s; votes %.1f MiB (%.2f %% of a 16-bit KV pool), arena %.1f MiB, message border %s",
        rt.config,
        used["votes_bytes"] / 2**20,
        100 * used["persistent_share_of_16_bit_pool"],
        used["arena_bytes"] / 2**20,
        rt.limits.border,
    )


@guarded()
def before_update_running_batch(self: Any, batch: Any) -> None:
    """BEFORE Scheduler.update_running_batch: the saving counts in the decode memory check."""
    if (rt := process.active()) is not None:
        step.compress_batch(rt, batch, partial(failing.fail, rt.scheduler))


@guarded()
def before_prepare_for_decode(self: Any) -> None:
    """BEFORE ScheduleBatch.prepare_for_decode: mixed chunks decode without update_running_batch."""
    if (rt := process.active()) is not None:
        step.compress_batch(rt, self, partial(failing.fail, rt.scheduler))
        metrics.between_steps(rt)


def _fail_chunked(error: Exception, _result: Any, self: Any, req: Any) -> None:
    if (state := known_state(req)) is not None:
        state.broken = True
    failing.fail(self, req, "compression between chunks", error)


@guarded(_fail_chunked)
def after_stash_chunked_request(_result: Any, self: Any, req: Any) -> None:
    """AFTER Scheduler.stash_chunked_request: spans planned at this chunk's end are due."""
    rt, state = process.active(), known_state(req)
    if rt is not None and state is not None and state.admitted and req.kv.holds_kv:
        step.compress_chunk(rt, req, state)


def _forget_row(_error: Exception, req: Any, *_args: Any, **_kwargs: Any) -> None:
    if (rt := process.active()) is not None:
        rt.forget_row(req)


@guarded_around(_forget_row)
def around_release(original: Any, req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    """AROUND release_kv_cache: publish what the row holds, then let SGLang free the rest.

    A retraction publishes too: its entries are evictable at once, and long prompts would otherwise be computed again
    and again under pressure.
    """
    rt, state = process.active(), known_state(req)
    if rt is not None and state is not None and state.admitted and req.kv.holds_kv:
        retracted = not req.finished() and req.to_finish is None
        # While the engine is paused the weights may change: what is retracted then must be computed again.
        paused = bool(getattr(rt.scheduler, "_engine_paused", False))
        publish = (checkpoint or (retracted and not paused)) and not req.skip_radix_cache_insert
        step.release(rt, req, state, publish=publish, retracted=retracted)
    if rt is not None and state is None and rt.calibration is not None and rt.calibration.wants(req):
        rt.calibration.finish(rt.arena)
    original(req, tree_cache, checkpoint=checkpoint)


def after_on_idle(_result: Any, self: Any) -> None:
    """AFTER Scheduler.on_idle: what watchers see is brought up to date. With KEEPKV_CHECK=1, every invariant of the
    cache and of what its slots hold, each time something has changed."""
    rt = process.active()
    if rt is not None:
        metrics.between_steps(rt)
    if rt is None or not rt.check_at_idle or not self.is_fully_idle() or rt.checked_at == rt.tree.spans.now:
        return
    rt.checked_at = rt.tree.spans.now
    rt.tree.check()
    check_contents(rt)
    if rt.originals is not None:
        rt.originals.check(idle=True)
