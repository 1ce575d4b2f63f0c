"""Admission counts the slots that a request will really hold, so that concurrency grows with the saving.

A prompt holds all its slots until it has been computed and only its budget afterwards; a reply grows by its budget and
one raw interval. SGLang's own estimate (prompt + max_new_tokens) is lowered to that, never raised. A prompt that is
computed in one chunk is compressed before the next decode step, so the replies of those that run may count on what
it gives back: it must fit what is free now, and its budget what others leave. turn/capacity.py does the counting.

The adder that counts so is in adder.py. A prompt longer than the pool is compressed between chunks and never needs
all its slots. SGLang refuses such prompts at four places, all counting logical tokens. We raise the scheduler's
limits to the context length, and refuse here what would not fit even compressed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from keepkv_sglang.faults import guard
from keepkv_sglang.faults.guard import guarded, guarded_around
from keepkv_sglang.hooks import failing, metrics
from keepkv_sglang.runtime import pressure, process, step
from keepkv_sglang.settings.config import ConfigError
from keepkv_sglang.turn.capacity import peak_slots
from keepkv_sglang.turn.eligibility import REASONS
from keepkv_sglang.turn.state import RequestState


def around_get_new_batch_prefill(original: Any, self: Any, running_batch: Any) -> Any:
    """AROUND Scheduler.get_new_batch_prefill: what compression gives back counts in this round's admission; a batch
    that we could not complete fails alone."""
    rt = process.active()
    if rt is None:
        return original(self, running_batch)
    before_admission(rt, running_batch)
    metrics.between_steps(rt)  # a long prompt's chunks have no decode steps between them
    rt.adder = None
    try:
        return original(self, running_batch)
    except guard.BatchError as error:
        from sglang.srt.managers.schedule_batch import (
            NextBatchPlan,  # start-up cost: seams.py loads this file everywhere
        )

        assert rt.adder is not None
        failing.drop_batch(self, rt.adder.can_run_list, error)
        for req in rt.adder.can_run_list:
            rt.forget_row(req)  # of those that never got a row: windows that were reserved
        return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
    finally:
        rt.adder = None


@guarded()
def before_admission(rt: process.Runtime, running_batch: Any) -> None:
    """Compresses what is due, then, when memory runs low, what nobody uses."""
    step.compress_batch(rt, running_batch, partial(failing.fail, rt.scheduler))
    if pressure.relieve(rt):
        running_batch.batch_is_full = False


def _refuse_settings(error: Exception, self: Any, req: Any) -> None:
    """This request fails: its settings are bad (400), or we are (500)."""
    if req.to_finish is None and not req.finished():
        if isinstance(error, ConfigError):
            req.set_finish_with_abort(str(error))
        else:
            message = f"KeepKV failed on this request ({type(error).__name__}); the server goes on"
            req.set_finish_with_abort(message, 500, "InternalServerError")


@guarded_around(_refuse_settings)
def around_init_req_max_new_tokens(original: Any, self: Any, req: Any) -> None:
    """AROUND Scheduler.init_req_max_new_tokens: every request passes here first. Its settings are resolved; a prompt
    longer than the pool needs KeepKV, or is refused."""
    rt = process.active()
    if rt is None or req.finished() or req.to_finish is not None:
        original(self, req)
        return
    try:
        state = rt.requests.state_of(req)
    except ConfigError as error:
        _refuse_settings(error, self, req)
        original(self, req)
        return
    tokens = len(req.origin_input_ids)
    if tokens < rt.limits.pool_limit:
        original(self, req)
        return
    # SGLang's admission wants one slot more than is used, on both sides.
    room = (
        rt.limits.capacity - peak_slots(rt.limits, state, req.origin_input_ids, tokens) - 2 if state is not None else 0
    )
    if room < 1:
        refuse_length(rt, req, state)
        original(self, req)
        return
    params = req.sampling_params
    wanted, at_least = params.max_new_tokens, params.min_new_tokens
    original(self, req)
    limits = [room, self.max_req_len - tokens - 1]
    limits += [wanted] if wanted is not None else []
    limits += [self.max_new_tokens_limit] if (self.max_new_tokens_limit or 0) > 0 else []
    params.max_new_tokens = max(0, min(limits))
    params.min_new_tokens = min(at_least, params.max_new_tokens)


def refuse_length(rt: process.Runtime, req: Any, state: RequestState | None) -> None:
    """The request ends with an HTTP 400 that says what would let it in."""
    advice = (
        "it does not fit even compressed; use a smaller budget, a smaller --chunked-prefill-size or a larger pool"
        if state is not None
        else REASONS[rt.requests.not_compressed(req).reason]
    )
    req.set_finish_with_abort(
        f"Input length ({len(req.origin_input_ids)} tokens) exceeds the maximum allowed length "
        f"({rt.limits.pool_limit} tokens) of this server's KV pool: {advice}."
    )
