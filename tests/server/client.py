"""Small helpers of the server tests: token prompts, one generate call, accounting read from /server_info."""

from __future__ import annotations

import random
import uuid
from typing import Any

from keepkv_sglang.server_process import ServerProcess

# SGLang's own checks, all of them: idle and busy accounting, double free and use after free.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    # Two OpenMP threads on a machine that does other things wait for each other; sleeping costs less.
    "OMP_WAIT_POLICY": "PASSIVE",
}
BORDER = 2  # <|im_end|> of SmolLM2, the chat template's end-of-message token


def tokens(count: int, seed: int) -> list[int]:
    """Random ordinary tokens: no message border, no shared prefix by accident."""
    rng = random.Random(seed)
    return [rng.randrange(1000, 40000) for _ in range(count)]


def body(ids: list[int], new: int, keepkv: Any = None, **extra: Any) -> dict[str, Any]:
    """A /generate request: greedy, exactly `new` tokens, logprobs of the output."""
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    if keepkv is not None:
        sampling["custom_params"] = {"keepkv": keepkv}
    return {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "rid": uuid.uuid4().hex, **extra}


class Answer:
    """One finished request."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.meta = data["meta_info"]
        self.ids: list[int] = data["output_ids"]
        self.logprobs = [entry[0] for entry in self.meta["output_token_logprobs"]]
        self.keepkv = self.meta.get("keepkv")
        self.cached: int = self.meta["cached_tokens"]
        self.rid: str = self.meta["id"]


def generate(server: ServerProcess, ids: list[int], new: int, keepkv: Any = None, **extra: Any) -> Answer:
    """Runs one request and expects HTTP 200."""
    status, data = server.post_json("/generate", body(ids, new, keepkv, **extra))
    assert status == 200, data
    return Answer(data)


def numbers(server: ServerProcess) -> dict[str, Any]:
    """KeepKV's part of /server_info; asserts the accounting of an idle server."""
    status, info = server.get_json("/server_info")
    assert status == 200
    state = info["internal_states"][0]["keepkv"]
    slots = [state[f"{kind}_slots"] for kind in ("available", "evictable", "protected")]
    assert sum(slots) == state["total_slots"], state
    assert state["active_rows"] == 0 and state["memory"]["arena_free_rows"] == state["memory"]["arena_rows"], state
    assert state["counters"]["mispublished"] == 0
    return state


def flush(server: ServerProcess) -> None:
    """Empties the prefix cache; every slot must be free afterwards."""
    status, _ = server.post_json("/flush_cache", {})
    assert status == 200
    state = numbers(server)
    assert state["available_slots"] == state["total_slots"] and state["entries"] == 0
