"""Small helpers of the server tests: token prompts, one generate call, accounting read from /server_info."""

from __future__ import annotations

import hashlib
import random
import uuid
from typing import Any

import msgspec
import zmq

from keepkv_sglang.tools.server_process import ServerProcess

# SGLang's own checks, all of them: idle and busy accounting, double free and use after free.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "KEEPKV_CHECK": "1",  # ours too: every invariant of radix/README.md whenever the server is idle
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
        self.retractions: int = self.meta["num_retractions"]
        self.rid: str = self.meta["id"]


def generate(server: ServerProcess, ids: list[int], new: int, keepkv: Any = None, **extra: Any) -> Answer:
    """Runs one request and expects HTTP 200."""
    status, data = server.post_json("/generate", body(ids, new, keepkv, **extra))
    assert status == 200, data
    return Answer(data)


def numbers(server: ServerProcess, faults: bool = False, rank: int = 0) -> dict[str, Any]:
    """KeepKV's part of /server_info; asserts the accounting of an idle server. faults: errors of ours are expected.
    rank: of data parallelism."""
    status, info = server.get_json("/server_info")
    assert status == 200
    state = info["internal_states"][rank]["keepkv"]
    slots = [state[f"{kind}_slots"] for kind in ("available", "evictable", "protected")]
    assert sum(slots) == state["total_slots"], state
    assert state["active_rows"] == 0 and state["memory"]["arena_free_rows"] == state["memory"]["arena_rows"], state
    assert state["counters"]["mispublished"] == 0
    assert faults or not state["errors"], state["errors"]
    return state


class Router:
    """What a cache-aware router learns from a server's KV events: which block hashes it holds."""

    def __init__(self, port: int) -> None:
        self.blocks: dict[int, tuple[int | None, int]] = {}  # hash -> (hash of the block before, token)
        self.cleared = 0
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def close(self) -> None:
        self._socket.close(linger=0)

    def listen(self, quiet_ms: int = 300) -> None:
        """Takes in everything that was published, until nothing came for a while."""
        while self._socket.poll(quiet_ms):
            for event in msgspec.msgpack.decode(self._socket.recv_multipart()[2])[1]:
                self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.blocks.clear()
            self.cleared += 1
        elif event["type"] == "BlockStored":
            parent = event.get("parent_block_hash")
            assert event["block_size"] == 1 and (parent is None or parent in self.blocks), "stored below nothing"
            for block, token in zip(event["block_hashes"], event["token_ids"], strict=True):
                self.blocks[block] = (parent, token)
                parent = block
        else:
            for block in event["block_hashes"]:
                del self.blocks[block]  # KeyError: removed twice

    def cached(self, ids: list[int]) -> int:
        """How many of these tokens the server holds: blocks of one token, each hash a SHA-256 of the one before."""
        digest = b""
        for count, token in enumerate(ids):
            digest = hashlib.sha256(digest + token.to_bytes(4, "little")).digest()
            if int.from_bytes(digest[:8], "big", signed=True) not in self.blocks:
                return count
        return len(ids)


def flush(server: ServerProcess, faults: bool = False) -> None:
    """Empties the prefix cache; every slot must be free afterwards. faults: as in numbers().

    An answer may be here before the scheduler has left its request, so SGLang is told to wait for that.
    """
    status, said = server.post_json("/flush_cache?timeout=30", {})
    assert status == 200, said
    state = numbers(server, faults)
    assert state["available_slots"] == state["total_slots"] and state["entries"] == 0
