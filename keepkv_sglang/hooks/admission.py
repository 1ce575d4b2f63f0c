"""Admission counts the slots that a request will really hold, so that concurrency grows with the saving.

A prompt holds all its slots until it has been computed and only its budget afterwards; a reply grows by its budget and
one raw interval. SGLang's own estimate (prompt + max_new_tokens) is lowered to that, never raised. A prompt that is
computed in one chunk is compressed before the next decode step, so the replies of those that run may count on what
it gives back: it must fit what is free now, and its budget what others leave.

The adder that counts so is in adder.py. A prompt longer than the pool is compressed between chunks and never needs
all its slots. SGLang refuses such prompts at four places, all counting logical tokens. We raise the scheduler's
limits to the context length, and refuse here what would not fit even compressed.
"""

from __future__ import annotations

from typing import Any

from keepkv_sglang import guard, pressure, runtime
from keepkv_sglang.anchor import first_message_end
from keepkv_sglang.config import ConfigError
from keepkv_sglang.eligibility import REASONS
from keepkv_sglang.guard import guarded, guarded_around
from keepkv_sglang.hooks import failing
from keepkv_sglang.hooks.scheduler import compress_batch
from keepkv_sglang.request import RequestState


def raise_limits(rt: runtime.Runtime, scheduler: Any) -> None:
    """After Scheduler.__init__: allows prompts up to the context length, where they can be compressed in chunks."""
    rt.capacity = int(scheduler.max_total_num_tokens)
    # With auto-truncation the user asked for cutting prompts at SGLang's limit instead.
    if not rt.chunk_tokens(scheduler) or rt.tree.disable or scheduler.server_args.allow_auto_truncate:
        return
    slack = scheduler.max_req_len - scheduler.max_req_input_len
    rt.pool_limit = rt.capacity - 1 - slack
    scheduler.max_req_len = max(scheduler.max_req_len, scheduler.model_config.context_len - 1)
    scheduler.max_req_input_len = scheduler.max_req_len - slack


def peak_slots(rt: runtime.Runtime, scheduler: Any, state: RequestState, req: Any, tokens: int) -> int:
    """Most slots that the last `tokens` of a prompt hold when compressed after every chunk, and one interval to decode.

    The anchor is not compressed. Chunks below min_tokens wait for the next one; each chunk rounds up once.
    """
    config = state.config
    chunk = min(rt.chunk_tokens(scheduler), tokens)
    anchor = first_message_end(req.origin_input_ids, rt.border)
    anchor = max(0, min(anchor - (len(req.origin_input_ids) - tokens), tokens))
    rest = max(1, tokens - anchor)
    held = state.slots_for(len(req.origin_input_ids) - rest, len(req.origin_input_ids))
    if config.counts_slots:
        held += max(0, held - chunk)  # merging the chain again needs fresh slots beside the old ones
    else:
        held += rest // max(1, chunk) + 1
    return anchor + held + config.min_tokens + chunk + config.interval


def later_slots(
    rt: runtime.Runtime, state: RequestState, req: Any, extend: int, new_tokens: int, taken: int = 0
) -> int:
    """Slots to reserve beyond the `extend` prompt tokens about to be computed, for `new_tokens` of reply; negative
    where the compression of the prompt, which comes before the next decode step, gives back more than the reply takes.

    taken: arena rows promised to others that are admitted in the same round.
    """
    assert rt.arena is not None
    if not state.admitted and rt.arena.free_rows - taken < rt.queries_of(state.config):
        return new_tokens  # no room for its queries: nothing of it will be compressed
    if state.admitted:  # a later chunk: the turn began before it
        turn = len(req.full_untruncated_fill_ids) - state.counted_tokens
    else:
        turn = extend - max(0, first_message_end(req.origin_input_ids, rt.border) - req.prefix_len)
    prompt, config = turn - 1, state.config  # the last prompt token belongs to the reply
    if prompt < config.min_tokens:
        return state.reply_growth(new_tokens)
    end = len(req.full_untruncated_fill_ids) - 1
    kept = state.slots_for(end - prompt, end)
    if config.span_tokens and not config.counts_slots:
        kept += prompt // config.span_tokens
    later = state.reply_growth(new_tokens) - max(0, prompt - kept)
    # Pieces of a cut prompt, and a reply computed again, may find no arena rows of their own and stay whole.
    return max(0, later) if config.span_tokens or req.output_ids else later


def around_get_new_batch_prefill(original: Any, self: Any, running_batch: Any) -> Any:
    """AROUND Scheduler.get_new_batch_prefill: what compression gives back counts in this round's admission; a batch
    that we could not complete fails alone."""
    rt = runtime.active()
    if rt is None:
        return original(self, running_batch)
    before_admission(rt, running_batch)
    rt.adder = None
    try:
        return original(self, running_batch)
    except guard.BatchError as error:
        from sglang.srt.managers.schedule_batch import NextBatchPlan

        assert rt.adder is not None
        failing.drop_batch(self, rt.adder.can_run_list, error)
        for req in rt.adder.can_run_list:
            rt.forget_row(req)  # of those that never got a row: windows that were reserved
        return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
    finally:
        rt.adder = None


@guarded()
def before_admission(rt: runtime.Runtime, running_batch: Any) -> None:
    """Compresses what is due, then, when memory runs low, what nobody uses."""
    compress_batch(running_batch)
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
    rt = runtime.active()
    if rt is None or req.finished() or req.to_finish is not None:
        original(self, req)
        return
    try:
        state = rt.state_of(req)
    except ConfigError as error:
        _refuse_settings(error, self, req)
        original(self, req)
        return
    tokens = len(req.origin_input_ids)
    if tokens < rt.pool_limit:
        original(self, req)
        return
    # SGLang's admission wants one slot more than is used, on both sides.
    room = rt.capacity - peak_slots(rt, self, state, req, tokens) - 2 if state is not None else 0
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


def refuse_length(rt: runtime.Runtime, req: Any, state: RequestState | None) -> None:
    """The request ends with an HTTP 400 that says what would let it in."""
    advice = (
        "it does not fit even compressed; use a smaller budget, a smaller --chunked-prefill-size or a larger pool"
        if state is not None
        else REASONS[rt.not_compressed(req).reason]
    )
    req.set_finish_with_abort(
        f"Input length ({len(req.origin_input_ids)} tokens) exceeds the maximum allowed length "
        f"({rt.pool_limit} tokens) of this server's KV pool: {advice}."
    )
