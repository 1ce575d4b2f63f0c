"""Admission of prompts that are longer than the pool: compressed between chunks, they never need all their slots.

SGLang refuses a prompt longer than the pool at four places, all counting logical tokens. We raise the scheduler's
limits to the context length, and refuse here what would not fit even compressed. Prompts that fit whole are admitted
by SGLang's own rules, unchanged.
"""

from __future__ import annotations

from typing import Any

from keepkv_sglang import runtime
from keepkv_sglang.request import RequestState


def raise_limits(rt: runtime.Runtime, scheduler: Any) -> None:
    """After Scheduler.__init__: remembers SGLang's input limit and allows prompts up to the context length."""
    rt.stock_max_input_len = scheduler.max_req_input_len
    rt.capacity = int(scheduler.max_total_num_tokens)
    if rt.chunk_tokens(scheduler) and not rt.tree.disable:
        slack = scheduler.max_req_len - scheduler.max_req_input_len
        scheduler.max_req_len = max(scheduler.max_req_len, scheduler.model_config.context_len - 1)
        scheduler.max_req_input_len = scheduler.max_req_len - slack


def peak_slots(rt: runtime.Runtime, scheduler: Any, state: RequestState, tokens: int) -> int:
    """Most slots a prompt of `tokens` holds when it is compressed after every chunk, and one interval to decode."""
    chunk = min(rt.chunk_tokens(scheduler), tokens)
    config = state.config
    if config.counts_slots:
        held = int(config.budget)
    else:
        # one rounding up per chunk, and chunks shorter than min_tokens stay whole
        held = config.kept_slots(0, tokens) + tokens // max(1, chunk) + 1 + config.min_tokens
    return held + chunk + config.interval


def around_init_req_max_new_tokens(original: Any, self: Any, req: Any) -> None:
    """AROUND Scheduler.init_req_max_new_tokens: a prompt longer than the pool needs KeepKV, or is refused."""
    rt = runtime.active()
    tokens = len(req.origin_input_ids)
    if rt is None or tokens < rt.stock_max_input_len or req.finished() or req.to_finish is not None:
        original(self, req)
        return
    state = rt.state_of(req)
    room = rt.capacity - peak_slots(rt, self, state, tokens) if state is not None else 0
    if room < 1:
        advice = (
            "it does not fit even compressed; use a smaller budget, a smaller --chunked-prefill-size or a larger pool"
            if state is not None
            else "KeepKV is off for it; a smaller budget would let it in"
        )
        req.set_finish_with_abort(
            f"Input length ({tokens} tokens) exceeds the maximum allowed length "
            f"({rt.stock_max_input_len} tokens) of this server's KV pool: {advice}."
        )
        original(self, req)
        return
    wanted = req.sampling_params.max_new_tokens
    original(self, req)
    limit = min(room, self.max_req_len - tokens - 1)
    req.sampling_params.max_new_tokens = max(0, limit if wanted is None else min(wanted, limit))


def after_get_prefill_adder_class(cls: Any, self: Any) -> Any:
    """AFTER Scheduler.get_prefill_adder_class: counts a too long prompt with the slots it will really hold."""
    config = runtime.configured()
    if config is None or not config.enabled:
        return cls
    return _adder_class(cls, self)


def _adder_class(cls: Any, scheduler: Any) -> Any:
    cached = _adders.get(cls)
    if cached is not None:
        return cached

    class KeepKVPrefillAdder(cls):
        def _check_prefill_budget(self, req: Any, *, extend_input_len: int, total_tokens: int, **kwargs: Any) -> Any:
            rt = runtime.active()
            state = rt.state_of(req) if rt is not None else None
            if rt is not None and state is not None and rt.too_long(req):
                peak = peak_slots(rt, scheduler, state, extend_input_len)
                total_tokens = min(total_tokens, total_tokens - extend_input_len + peak)
            return super()._check_prefill_budget(
                req, extend_input_len=extend_input_len, total_tokens=total_tokens, **kwargs
            )

    _adders[cls] = KeepKVPrefillAdder
    return KeepKVPrefillAdder


_adders: dict[Any, Any] = {}
