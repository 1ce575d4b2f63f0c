"""meta_info["keepkv"]: what a request's answer says about it."""

from __future__ import annotations

from typing import Any

from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.turn.state import RequestState


def info(rt: Runtime, req: Any) -> dict[str, Any]:
    """The same keys for every request; merged and dropped are means over layers and kv heads, in tokens.

    A request that is never compressed holds one slot for each token that the model has read: all but the last sampled
    one. It says why (`reason`).
    """
    state = rt.requests.state_of(req)
    if state is not None:
        state.count_merged()
        return _info(state.config.enabled, state.config.budget, state)
    off = rt.requests.not_compressed(req)
    tokens = len(req.origin_input_ids) + max(0, len(req.output_ids) - 1)
    counts = RequestState(rt.config, (), len(req.origin_input_ids), logical_tokens=tokens, slots_held=tokens)
    return {**_info(False, off.budget, counts), "reason": off.reason}


def count(rt: Runtime, req: Any, said: dict[str, Any]) -> None:
    """Adds what an answer says (`info`) to the counters. Once per answer."""
    counters, saved = rt.counters, said["logical_tokens"] - said["slots_held"]
    counters.answers += 1
    counters.answers_compressed += saved > 0
    counters.answers_off += not said["enabled"]
    counters.prompt_tokens += len(req.origin_input_ids)
    counters.cached_tokens += req.cached_tokens
    counters.hit_tokens += said["cached_compressed_tokens"]
    counters.logical_tokens += said["logical_tokens"]
    counters.saved_slots += saved
    counters.merged_tokens += said["merged"]
    counters.dropped_tokens += said["dropped"]


def _info(enabled: bool, budget: float | int, state: RequestState) -> dict[str, Any]:
    return {
        "enabled": enabled,
        "budget": budget,
        "logical_tokens": state.logical_tokens,
        "slots_held": state.slots_held,
        "protected_tokens": state.protected_tokens,
        "cached_compressed_tokens": state.cached_compressed_tokens,
        "unpacked_tokens": state.unpacked_tokens,
        "merged": round(state.merged, 2),
        "dropped": round(state.dropped, 2),
        "compressions": state.compressions,
        "head_share": [round(share, 2) for share in state.head_share],
    }
