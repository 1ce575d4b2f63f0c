"""Ten bugs, each planted into one function of a running server: what a soak must find.

A mutant does nothing until the file KEEPKV_SOAK_ARMED exists, when the load begins: the quiet answers are those of a
right server, as before an error that only a load brings about. Most then strike at every n-th call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.memory.originals import BlockStore
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.radix.adapter.cache import KeepKVRadixCache
from keepkv_sglang.radix.span import Span
from keepkv_sglang.runtime import compressor
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import Requests, known_state

Strike = Callable[[int], bool]
"""strike(n): armed, and this is an n-th call."""


def plant(name: str, armed: Path) -> None:
    calls = itertools.count(1)
    MUTANTS[name](lambda n: armed.exists() and next(calls) % n == 0)


def around(owner: Any, name: str, wrapped: Callable[..., Any]) -> None:
    """wrapped(real, *args, **kwargs) instead of owner.name."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapped(real, *args, **kwargs)

    setattr(owner, name, call)


def lost_unlock(strike: Strike) -> None:
    """A request that ends leaves its compressed prefix locked."""

    def unlock(real: Any, self: Any, lock: Any) -> None:
        if lock is None or not isinstance(lock.node, Span) or not strike(10):
            real(self, lock)

    around(KeepKVRadixCache, "unlock", unlock)


def slot_freed_twice(strike: Strike) -> None:
    """An evicted span's first slot goes to the free list a second time."""

    def drop(real: Any, self: Any, dead: Any, tracker: Any = None) -> None:
        real(self, dead, tracker)
        if dead and strike(3):
            self.token_to_kv_pool_allocator.free(dead[0].slots[:1])

    around(KeepKVRadixCache, "drop_spans", drop)


def stale_vote(strike: Strike) -> None:
    """A slot that is written again keeps the votes that it had."""

    def reset(real: Any, self: Any, layer: int, slots: Any) -> None:
        if not strike(2):
            real(self, layer, slots)

    around(VoteStore, "reset", reset)


def wrong_namespace(strike: Strike) -> None:
    """A request's salt is no part of the key of what is cached compressed."""

    def resolve(real: Any, self: Any, req: Any) -> None:
        real(self, req)
        state = known_state(req)
        if state is not None and strike(1):
            state.namespace = (state.namespace[0], None, *state.namespace[2:])

    around(Requests, "_resolve", resolve)


def late_copy(strike: Strike) -> None:
    """Originals are copied to host memory when the next ones are: their slots have been merged by then."""
    waiting: list[Any] = []

    def write(real: Any, self: Any, blocks: Any, counts: Any, keys: Any, values: Any, slots: Any) -> None:
        waiting.append((self, list(blocks), list(counts), keys, values, slots.clone()))
        if not strike(1):
            real(*waiting.pop())
        elif len(waiting) > 1:
            real(*waiting.pop(0))

    around(BlockStore, "write", write)


def offset_off_by_one(strike: Strike) -> None:
    """Behind a compression positions are one too large."""

    def set_offset(real: Any, self: Any, req: Any, state: Any, offset: int) -> None:
        real(self, req, state, offset)
        if offset and req.kv.req_pool_idx is not None and strike(3):
            self.offsets[req.kv.req_pool_idx] = offset + 1

    around(Runtime, "set_offset", set_offset)


def block_never_freed(strike: Strike) -> None:
    """One of the blocks of host memory that come back does not."""

    def give_back(real: Any, self: Any, blocks: Any) -> None:
        blocks = list(blocks)
        real(self, blocks[1:] if strike(3) else blocks)

    around(BlockStore, "give_back", give_back)


def lock_on_the_wrong_node(strike: Strike) -> None:
    """What a row has published is not locked, its parent is: it may be evicted under the row."""

    def move_lock(real: Any, self: Any, req: Any, node: Any, slots: int) -> None:
        real(self, req, node, slots)
        if isinstance(node, Span) and node.parent is not None and strike(3):
            wrong = self.lock(node.parent)
            self.unlock(req.lock)
            req.lock = wrong

    around(KeepKVRadixCache, "move_lock", move_lock)


def published_one_too_long(strike: Strike) -> None:
    """A compressed prompt is cached under one token more than its slots stand for."""

    def publish(
        real: Any, cache: Any, req: Any, namespace: Any, tokens: Any, first: int, start: int, m: int, *,
        raw: bool, lookahead: int = 0,
    ) -> Any:  # fmt: skip
        if not raw and lookahead and strike(3):
            end = first + len(tokens)
            tokens = tokens + cache.requests.tokens_of(req)[end : end + 1]
            lookahead -= 1
        return real(cache, req, namespace, tokens, first, start, m, raw=raw, lookahead=lookahead)

    around(KeepKVRadixCache, "publish_span", publish)


def merged_votes_lost(strike: Strike) -> None:
    """A compression's slots stand for one token each, whatever joined them."""

    def losing(real: Any, storage: Any, rows: Any, *args: Any) -> Any:
        yield from real(storage, rows, *args)
        if strike(3):
            for votes in storage.log_votes:
                votes.index_fill_(0, rows.target.to(torch.int64), 0.0)

    around(compressor, "row_pieces", losing)
    around(compressor, "packed_pieces", losing)


MUTANTS: dict[str, Callable[[Strike], None]] = {
    mutant.__name__: mutant
    for mutant in (
        lost_unlock, slot_freed_twice, stale_vote, wrong_namespace, late_copy, offset_off_by_one, block_never_freed,
        lock_on_the_wrong_node, published_one_too_long, merged_votes_lost,
    )
}  # fmt: skip
