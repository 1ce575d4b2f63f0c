"""Admission counts the slots that a request will really hold, so that concurrency grows with the saving.

A prompt holds all its slots until it has been computed and only its budget afterwards; a reply grows by its budget and
one raw interval. SGLang's own estimate (prompt + max_new_tokens) is lowered to that, never raised. A prompt that is
computed in one chunk is compressed before the next decode step, so the replies of those that run may count on what
it gives back: it must fit what is free now, and its budget what others leave.

A prompt longer than the pool is compressed between chunks and never needs all its slots. SGLang refuses such prompts at
four places, all counting logical tokens. We raise the scheduler's limits to the context length, and refuse here what
would not fit even compressed.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from keepkv_sglang import pressure, runtime
from keepkv_sglang.anchor import first_message_end
from keepkv_sglang.hooks.scheduler import compress_batch
from keepkv_sglang.radix.span import Span
from keepkv_sglang.request import RequestState

logger = logging.getLogger("keepkv")


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


def before_get_new_batch_prefill(self: Any, running_batch: Any) -> None:
    """BEFORE Scheduler.get_new_batch_prefill: what compression gives back counts in this round's admission."""
    rt = runtime.active()
    if rt is not None:
        compress_batch(running_batch)
        if pressure.relieve(rt):
            running_batch.batch_is_full = False


def around_init_req_max_new_tokens(original: Any, self: Any, req: Any) -> None:
    """AROUND Scheduler.init_req_max_new_tokens: a prompt longer than the pool needs KeepKV, or is refused."""
    rt = runtime.active()
    tokens = len(req.origin_input_ids)
    if rt is None or tokens < rt.pool_limit or req.finished() or req.to_finish is not None:
        original(self, req)
        return
    state = rt.state_of(req)
    # SGLang's admission wants one slot more than is used, on both sides.
    room = rt.capacity - peak_slots(rt, self, state, req, tokens) - 2 if state is not None else 0
    if room < 1:
        _refuse(rt, req, state)
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


def _refuse(rt: runtime.Runtime, req: Any, state: RequestState | None) -> None:
    advice = (
        "it does not fit even compressed; use a smaller budget, a smaller --chunked-prefill-size or a larger pool"
        if state is not None
        else "KeepKV is off for it; a smaller budget would let it in"
    )
    req.set_finish_with_abort(
        f"Input length ({len(req.origin_input_ids)} tokens) exceeds the maximum allowed length "
        f"({rt.pool_limit} tokens) of this server's KV pool: {advice}."
    )


def after_get_prefill_adder_class(cls: Any, self: Any) -> Any:
    """AFTER Scheduler.get_prefill_adder_class: requests count with the slots they will really hold."""
    config = runtime.configured()
    if config is None or not config.enabled:
        return cls
    if cls not in _adders:
        _adders[cls] = _adder_class(cls, self)
    return _adders[cls]


def _left_behind(req: Any, state: RequestState) -> int:
    """Slots that the next compression takes beside those it reads: recent tokens in a cached span that others use, such
    as parallel samples, are not given back."""
    node = req.last_node
    cached = req.kv.holds_kv and req.kv.cache_protected_len > state.tail_slots
    return state.carried if cached and isinstance(node, Span) and node.lock_ref > 1 else 0


_adders: dict[Any, Any] = {}


def _adder_class(cls: Any, scheduler: Any) -> Any:
    class KeepKVPrefillAdder(cls):
        _arena_rows = 0  # promised to prompts of this round, which take them when they run

        def _compressed(self, req: Any) -> tuple[runtime.Runtime, RequestState] | None:
            rt = runtime.active()
            state = rt.state_of(req) if rt is not None else None
            return (rt, state) if rt is not None and state is not None else None

        def _get_running_request_total_token_offset(self, req: Any) -> float:
            tokens = super()._get_running_request_total_token_offset(req)
            found = self._compressed(req)
            if found is None or tokens <= 0:
                return tokens
            rt, state = found
            if state.reply_window is None and not rt.room_for_replies():
                return tokens  # no room for its queries: its reply will stay as it is
            return min(tokens, state.reply_growth(math.ceil(tokens)) + _left_behind(req, state))

        def _update_prefill_budget(
            self, prefix_len: int, extend_input_len: int, max_new_tokens: int, *args: Any, **kwargs: Any
        ) -> None:
            req = self.can_run_list[-1]  # SGLang appends first, then charges
            found = self._compressed(req)
            if found is not None:
                later = self._later(*found, req, extend_input_len, max_new_tokens)
                ends = req.extend_end >= len(req.full_untruncated_fill_ids)
                # A chunk gives nothing back before the last one.
                max_new_tokens = min(max_new_tokens, later if ends else max(0, later))
                if not found[1].admitted:
                    self._arena_rows += found[0].queries_of(found[1].config)
            super()._update_prefill_budget(prefix_len, extend_input_len, max_new_tokens, *args, **kwargs)

        def _later(self, rt: runtime.Runtime, state: RequestState, req: Any, extend: int, new_tokens: int) -> int:
            return later_slots(rt, state, req, extend, new_tokens, self._arena_rows)

        def _others_run(self, req: Any) -> bool:
            running = self.running_batch.reqs if self.running_batch is not None else ()
            return any(other is not req and not other.finished() for other in [*running, *self.can_run_list])

        def _check_prefill_budget(self, req: Any, *, extend_input_len: int, total_tokens: int, **kwargs: Any) -> Any:
            limit, found = kwargs.get("chunk_limit"), self._compressed(req)
            chunk = extend_input_len if limit is None else min(extend_input_len, limit)
            # SGLang looks at what is promised only, which can now be less than what this round takes.
            if chunk + self.per_req_token_overhead >= self.cur_rem_tokens:
                return False, None
            if found is not None and found[0].too_long(req):
                total_tokens = self._too_long_total(*found, req, extend_input_len, total_tokens)
            elif found is not None:
                wanted = total_tokens - extend_input_len
                later = self._later(*found, req, extend_input_len, wanted)
                if chunk < extend_input_len:
                    later = max(0, later)  # it must be in the pool whole before it gives anything back
                total_tokens = extend_input_len + min(wanted, later + self.per_req_token_overhead)
            return super()._check_prefill_budget(
                req, extend_input_len=extend_input_len, total_tokens=total_tokens, **kwargs
            )

        def _too_long_total(self, rt: runtime.Runtime, state: RequestState, req: Any, extend: int, total: int) -> int:
            peak = peak_slots(rt, scheduler, state, req, extend)
            total = min(total, total - extend + peak)
            if not self._others_run(req) and total >= self.rem_total_tokens:
                # Alone in the server: what it may generate is cut by the pool anyway.
                total = peak + 1
                if total >= self.rem_total_tokens:
                    logger.warning("request %s can never be admitted: a cached prefix leaves no room", req.rid)
                    _refuse(rt, req, state)
            return total

        def add_chunked_req(self, req: Any) -> Any:
            """A chunk that finds no slots waits for others to finish, or fails alone; SGLang would stop the server."""
            found = self._compressed(req)
            if found is not None:
                rt, _ = found
                missing = len(req.full_untruncated_fill_ids) - req.prefix_len
                chunk = min(missing, self.rem_chunk_tokens or missing)
                if rt.allocator.available_size() + rt.tree.evictable_size() < chunk:
                    if not self._others_run(req):
                        from sglang.srt.managers.schedule_batch import FINISH_ABORT

                        req.discard_output_reason = FINISH_ABORT(
                            "The KV pool is full in the middle of this prompt; use a smaller budget, a smaller "
                            "--chunked-prefill-size or a larger pool.",
                        )
                        scheduler._pending_chunked_abort_req = req
                    return req
            return super().add_chunked_req(req)

    return KeepKVPrefillAdder
