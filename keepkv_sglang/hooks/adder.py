"""SGLang's prefill adder, which says who joins the next prefill batch; requests count as admission.py counts them.

A chunk of a prompt that finds no slots is parked, as SGLang's own adder parks chunks of sliding-window models. SGLang
adds one to the parked request's unfinished chunks when it builds a batch, so a round with a parked chunk admits nobody:
a batch of others would make it drop the first token of the parked request's reply. SGLang is imported where it is used,
as in failing.py.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from keepkv_sglang.faults.guard import guarded
from keepkv_sglang.hooks.admission import refuse_length
from keepkv_sglang.radix.span import Span
from keepkv_sglang.runtime import process, stream, unpack
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.settings.values import shown
from keepkv_sglang.turn.capacity import peak_slots
from keepkv_sglang.turn.state import RequestState

logger = logging.getLogger("keepkv")

FULL_POOL = (
    "The KV pool is full in the middle of this prompt; use a smaller budget, a smaller --chunked-prefill-size or a "
    "larger pool."
)


def _total_of_sglang(error: Exception, _self: Any, req: Any, _extend: int, _chunk: int, total: int) -> int:
    """By SGLang's estimate a prompt longer than the pool would wait for ever."""
    rt = process.active()
    if rt is not None and rt.requests.too_long(req):
        message = f"KeepKV failed on this request ({type(error).__name__}); the server goes on"
        req.set_finish_with_abort(message, 500, "InternalServerError")
    return total


class KeepKVAdder:
    """Overrides of SGLang's PrefillAdder; `adder_class` puts them in front of the class that SGLang would use.

    An error in any of them leaves SGLang's own estimate.
    """

    _arena_rows = 0  # promised to prompts of this round, which take them when they run
    _parked = False  # a chunk waits for slots

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        rt = process.active()
        if rt is not None:
            rt.adder = self
        super().__init__(*args, **kwargs)

    def _compressed(self, req: Any) -> tuple[Runtime, RequestState] | None:
        rt = process.active()
        state = rt.requests.state_of(req) if rt is not None else None
        return (rt, state) if rt is not None and state is not None else None

    # -- running requests ---------------------------------------------------------------------------------------------

    def _get_running_request_total_token_offset(self, req: Any) -> float:
        return self._will_hold(req, super()._get_running_request_total_token_offset(req))  # type: ignore[misc]

    @guarded(lambda _error, _self, _req, tokens: tokens)
    def _will_hold(self, req: Any, tokens: float) -> float:
        found = self._compressed(req)
        if found is None or tokens <= 0:
            return tokens
        rt, state = found
        if state.reply_queries is None and not rt.limits.room_for_replies():
            return tokens  # no room for its queries: its reply will stay as it is
        return min(tokens, state.reply_growth(math.ceil(tokens)) + _left_behind(req, state))

    # -- originals ----------------------------------------------------------------------------------------------------

    def add_one_req(self, req: Any, *args: Any, **kwargs: Any) -> Any:
        """With slots for its history's originals where there is room; else, in the same round, over its compressed
        match, with the originals streamed or without."""
        asked = self._propose(req)
        result = super().add_one_req(req, *args, **kwargs)  # type: ignore[misc]
        if asked and not self._has(req) and self._withdraw(req, result):
            result = super().add_one_req(req, *args, **kwargs)  # type: ignore[misc]
        if not self._has(req):
            self._give_up(req)
        return result

    def _has(self, req: Any) -> bool:
        return any(other is req for other in self.can_run_list)  # type: ignore[attr-defined]

    @guarded(lambda *_: False)
    def _propose(self, req: Any) -> bool:
        from sglang.srt.environ import envs

        found = self._compressed(req)
        if found is None or envs.SGLANG_RADIX_FORCE_MISS.get():
            return False
        return unpack.propose(found[0], req, found[1], self._arena_rows)

    @guarded(lambda *_: False)
    def _withdraw(self, req: Any, result: Any) -> bool:
        """Whether the request is to be looked at again."""
        from sglang.srt.managers.schedule_policy import AddReqResult

        found = self._compressed(req)
        assert found is not None
        rt, state = found
        failed = unpack.withdraw(rt, req, state)
        return failed or result is AddReqResult.NO_TOKEN

    @guarded()
    def _give_up(self, req: Any) -> None:
        found = self._compressed(req)
        if found is not None:
            stream.give_up(found[0], req, found[1])

    # -- new requests -------------------------------------------------------------------------------------------------

    def _update_prefill_budget(
        self, prefix_len: int, extend_input_len: int, max_new_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        req = self.can_run_list[-1]  # type: ignore[attr-defined]  # SGLang appends first, then charges
        charged = self._charge(req, extend_input_len, max_new_tokens)
        super()._update_prefill_budget(prefix_len, extend_input_len, charged, *args, **kwargs)  # type: ignore[misc]

    @guarded(lambda _error, _self, _req, _extend, new_tokens: new_tokens)
    def _charge(self, req: Any, extend: int, new_tokens: int) -> int:
        found = self._compressed(req)
        if found is None:
            return new_tokens
        rt, state = found
        later = unpack.later(rt, req, state, extend, new_tokens, self._arena_rows)
        ends = req.extend_end >= len(req.full_untruncated_fill_ids)
        if not state.admitted:
            self._arena_rows += rt.limits.queries_of(state.config)
        # A chunk gives nothing back before the last one.
        return later if ends else max(0, later)

    def _others_run(self, req: Any) -> bool:
        running = self.running_batch.reqs if self.running_batch is not None else ()  # type: ignore[attr-defined]
        others = [*running, *self.can_run_list]  # type: ignore[attr-defined]
        return any(other is not req and not other.finished() for other in others)

    def _check_prefill_budget(self, req: Any, *, extend_input_len: int, total_tokens: int, **kwargs: Any) -> Any:
        limit = kwargs.get("chunk_limit")
        chunk = extend_input_len if limit is None else min(extend_input_len, limit)
        # SGLang looks at what is promised only, which can now be less than what this round takes.
        if req.host_hit_length + chunk + self.per_req_token_overhead >= self.cur_rem_tokens:  # type: ignore[attr-defined]
            return False, None
        total_tokens = self._total(req, extend_input_len, chunk, total_tokens)
        return super()._check_prefill_budget(  # type: ignore[misc]
            req, extend_input_len=extend_input_len, total_tokens=total_tokens, **kwargs
        )

    @guarded(_total_of_sglang)
    def _total(self, req: Any, extend: int, chunk: int, total: int) -> int:
        found = self._compressed(req)
        if found is None:
            return total
        rt, state = found
        if rt.requests.too_long(req):
            return self._too_long_total(rt, state, req, extend, total)
        brought = req.host_hit_length  # takes its slots at once, and is compressed with the prompt
        wanted = total - extend - brought
        later = unpack.later(rt, req, state, extend, wanted, self._arena_rows)
        if chunk < extend:
            later = max(0, later)  # it must be in the pool whole before it gives anything back
        overhead: int = self.per_req_token_overhead  # type: ignore[attr-defined]
        later += overhead
        return brought + extend + (later if state.streamed else min(wanted, later))

    def _too_long_total(self, rt: Runtime, state: RequestState, req: Any, extend: int, total: int) -> int:
        peak = peak_slots(rt.limits, state, req.origin_input_ids, extend)
        total = min(total, total - extend + peak)
        room = self.rem_total_tokens  # type: ignore[attr-defined]
        if not self._others_run(req) and total >= room:
            # Alone in the server: what it may generate is cut by the pool anyway.
            total = peak + 1
            if total >= room:
                logger.warning("request %s can never be admitted: a cached prefix leaves no room", shown(str(req.rid)))
                refuse_length(rt, req, state)
        return total

    # -- the next chunk of a prompt -----------------------------------------------------------------------------------

    def add_chunked_req(self, req: Any) -> Any:
        """A chunk that finds no slots waits for others to finish, or fails alone; SGLang would stop the server."""
        self._parked = True
        if self._waits(req):
            return req
        left = super().add_chunked_req(req)  # type: ignore[misc]
        self._parked = req not in self.can_run_list  # type: ignore[attr-defined]
        return left

    @guarded(lambda *_: False)
    def _waits(self, req: Any) -> bool:
        rt = process.active()
        if rt is None:
            return False
        missing = len(req.full_untruncated_fill_ids) - req.prefix_len
        limit = self.rem_chunk_tokens  # type: ignore[attr-defined]
        if limit and self._compressed(req) is None:  # SGLang then takes what nobody was promised
            limit = self.memory_budget.available_chunk_tokens(limit)  # type: ignore[attr-defined]
        if rt.allocator.available_size() + rt.tree.evictable_size() >= min(missing, limit or missing):
            return False
        rt.counters.parked += 1
        if not self._others_run(req) and rt.scheduler._pending_chunked_abort_req in (None, req):
            from sglang.srt.managers.schedule_batch import FINISH_ABORT

            req.discard_output_reason = FINISH_ABORT(FULL_POOL)
            rt.scheduler._pending_chunked_abort_req = req
        return True

    def budget_state(self) -> Any:
        """SGLang asks before it looks at each waiting request, and before it preempts for one."""
        from sglang.srt.managers.schedule_policy import AddReqResult

        return AddReqResult.OTHER if self._parked else super().budget_state()  # type: ignore[misc]


def _left_behind(req: Any, state: RequestState) -> int:
    """Slots that the next compression takes beside those it reads: recent tokens in a cached span that others use, such
    as parallel samples, are not given back."""
    node = req.last_node
    cached = req.kv.holds_kv and req.kv.cache_protected_len > state.tail_slots
    return state.carried if cached and isinstance(node, Span) and node.lock_ref > 1 else 0


_classes: dict[Any, Any] = {}


def adder_class(cls: Any) -> Any:
    """SGLang's class with our overrides in front."""
    if cls not in _classes:
        _classes[cls] = type("KeepKVPrefillAdder", (KeepKVAdder, cls), {})
    return _classes[cls]


def after_get_prefill_adder_class(cls: Any, self: Any) -> Any:
    """AFTER Scheduler.get_prefill_adder_class: requests count with the slots they will really hold."""
    config = process.configured()
    return cls if config is None or not config.enabled else adder_class(cls)
