"""The archive: originals of compressed tokens by what was asked before them, in host memory.

An index, a second SpanTree whose spans are blocks of up to 64 tokens, says which block holds what; memory/originals.py
holds the bytes. Everything is decided by counts and logical clocks: tensor-parallel ranks keep the same blocks.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from keepkv_sglang.memory.originals import BlockStore, Staging
from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree
from keepkv_sglang.runtime.counters import Counters

NOBODYS_SLOT = 0
"""SGLang writes padding there; so do we with tokens of a block that the row has already."""


MOST_CHECKED = 2000
"""Blocks from which on the walk over every block's whole path takes minutes."""


class Originals:
    """keys, values: the KV pool, one tensor [slots, heads, dim] per layer. staging: what histories without slots are
    read through; None: they are read compressed.

    A running request holds the chain of blocks that its row begins with (`held`), so that what it archives next has a
    place. Blocks that nobody holds make room for others, the least recently used chain's end first.
    """

    def __init__(
        self,
        store: BlockStore,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        counters: Counters,
        staging: Staging | None = None,
    ) -> None:
        self.store, self.counters, self.staging = store, counters, staging
        self.keys, self.values = keys, values
        self.index = SpanTree()
        self._held: dict[Hashable, Span] = {}
        # Of requests: between admission and their row (unpack.Unpacking), and slots that rows hold unpacked.
        self.unpacking: dict[Hashable, Any] = {}
        self.rows: dict[Hashable, int] = {}
        self.streams: dict[Hashable, Any] = {}  # of requests, until their history is compressed again (stream.Stream)
        self.missed: dict[Hashable, str] = {}  # counter of why a request that waits is to read its match
        self.unpacked_slots = 0

    # -- reading ------------------------------------------------------------------------------------------------------

    def covers(self, namespace: Hashable, tokens: array[int], limit: int) -> Span | None:
        """The last block of the longest beginning of tokens[:limit] that is archived; its path_tokens say how long.

        tokens: with the marks of what is protected (radix/marks.py). Marks nothing as used.
        """
        return self.index.match([(None, 0)], namespace, tokens, limit, touch=False)

    def read(self, last: Span, start: int, slots: torch.Tensor) -> None:
        """Writes the originals of the tokens from `start` on into `slots` (int64, one per token). last: a block behind
        which, or in which, they end."""
        began = time.perf_counter()
        blocks, counts, slots = self.cut(last, start, slots)
        self.store.read(blocks, counts, self.keys, self.values, slots)
        self.index.touch(last, hit=True)
        self.counters.originals_seconds += time.perf_counter() - began

    @staticmethod
    def cut(last: Span, start: int, slots: torch.Tensor) -> tuple[list[int], list[int], torch.Tensor]:
        """The blocks of the tokens from `start` on, one per entry of `slots`: (block numbers, tokens in each, where all
        of these go: what nobody asked for of the first and the last block goes to NOBODYS_SLOT)."""
        end = start + len(slots)
        blocks = [span for span in last.path() if span.path_tokens > start and span.path_tokens - span.n < end]
        before, behind = start - (blocks[0].path_tokens - blocks[0].n), blocks[-1].path_tokens - end
        nobody = slots.new_full((before + behind,), NOBODYS_SLOT)
        return (
            [block.slots for block in blocks],
            [block.n for block in blocks],
            torch.cat([nobody[:before], slots, nobody[before:]]),
        )

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """K and V of slots `source` to slots `target`, both int64, in every layer."""
        for buffer in (*self.keys, *self.values):
            buffer[target] = buffer[source]

    # -- writing ------------------------------------------------------------------------------------------------------

    def archive(
        self, below: Span | None, namespace: Hashable, tokens: array[int], slots: torch.Tensor, pure: bool
    ) -> Span | None:
        """Archives `tokens`, which follow `below` and lie in `slots`, in blocks; returns the last one.

        below: held by the caller. pure: nothing that they attended to was compressed. Where there is no room the end is
        left out, and nothing can follow it.
        """
        began = time.perf_counter()
        size = self.store.block_tokens
        cuts = range(0, len(tokens), size)
        blocks = self.store.take(min(self._make_room(len(cuts)), len(cuts)))
        stored = min(len(tokens), len(blocks) * size)
        counts = [min(size, stored - at) for at in cuts[: len(blocks)]]
        try:
            self.store.write(blocks, counts, self.keys, self.values, slots[:stored])
        except Exception:
            self.store.give_back(blocks)
            raise
        last, end = below, (below.path_tokens if below is not None else 0) + stored
        for at, count, block in zip(cuts, counts, blocks, strict=False):
            last, created = self.index.insert(
                parent=last,
                anchor=None,
                anchor_len=0,
                namespace=namespace,
                tokens=tokens[at : at + count],
                slots=block,
                m=count,
                raw=True,
                meta=pure and (last is None or last.meta),
                reach=end,
            )
            if not created:  # a twin was quicker
                self.store.give_back([block])
        if blocks:
            assert last is not None
            self.index.touch(last)
        self.counters.archived_tokens += stored
        self.counters.archive_full_tokens += len(tokens) - stored
        self.counters.originals_seconds += time.perf_counter() - began
        return last

    def _make_room(self, blocks: int) -> int:
        """Blocks that are free after others made room for at most `blocks`."""
        while self.store.free_blocks < blocks and (oldest := self.index.oldest()) is not None:
            self.index.remove(oldest)
            self.store.give_back([oldest.slots])
        return self.store.free_blocks

    def pure(self, last: Span, end: int) -> bool:
        """Whether tokens [0, end) come back as any request with that beginning would compute them: the `meta` of a
        block says so of all tokens up to there. last: ends the chain."""
        block = last
        while block.parent is not None and block.parent.path_tokens >= end:
            block = block.parent
        return self.store.exact and bool(block.meta)

    # -- who holds what -----------------------------------------------------------------------------------------------

    def held(self, owner: Hashable) -> Span | None:
        """The last block of the chain that a request holds."""
        return self._held.get(owner)

    def hold(self, owner: Hashable, last: Span) -> None:
        """The request holds this chain instead of the one before. The new lock first, as in the prefix cache."""
        self.index.lock(last)
        self.release(owner)
        self._held[owner] = last

    def release(self, owner: Hashable) -> None:
        """The request holds nothing any more. Safe to call twice."""
        if (last := self._held.pop(owner, None)) is not None and not last.dead:
            self.index.unlock(last)

    def packed(self, owner: Hashable) -> None:
        """The request's history is compressed again, or gone: its slots no longer count. Safe to call twice."""
        self.unpacked_slots -= self.rows.pop(owner, 0)
        self.streams.pop(owner, None)

    def forget(self, owner: Hashable, allocator: Any) -> None:
        """The request gives its row back. Slots that no row has taken over are freed. Safe to call twice."""
        unpacking = self.unpacking.pop(owner, None)
        if unpacking is not None and unpacking.slots is not None:
            allocator.free(unpacking.slots)
            self.unpacked_slots -= len(unpacking.slots)
        self.missed.pop(owner, None)
        self.packed(owner)
        self.release(owner)

    def reset(self) -> None:
        """Forgets everything: the prefix cache was flushed."""
        self.store.give_back([span.slots for span in self.index.spans()])
        self.index.reset()
        self._held.clear()

    # -- numbers ------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens that are archived."""
        return self.index.evictable_slots + self.index.protected_slots

    def check(self, idle: bool = False) -> None:
        """AssertionError unless every block is free or one live span's, once (H1). idle: nothing runs, so nothing may
        be held. Walks everything: for tests."""
        if idle:
            busy = self._held or self.unpacking or self.rows or self.streams or self.unpacked_slots
            assert not busy, "held although nothing runs"
            assert not self.index.protected_slots, "blocks are locked although nothing runs"
        if len(self.index) <= MOST_CHECKED:
            check_tree(self.index)
        used = [span.slots for span in self.index.spans()]
        free = self.store._free
        assert sorted([*used, *free]) == list(range(self.store.blocks)), "a block was lost or belongs to two"
        size = self.store.block_tokens
        assert all(0 < span.n <= size for span in self.index.spans()), "a block holds at most 64 tokens"
