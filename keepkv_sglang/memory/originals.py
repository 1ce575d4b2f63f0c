"""Host memory for the originals of compressed tokens: blocks of up to 64 tokens, of all layers; and what one layer of a
history is read through where it has no slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from keepkv_sglang.kernels.codec import BLOCK_TOKENS, BlockLayout, decode, encode

MOST_STAGED = 256 << 20
"""Bytes: 32,768 tokens of one layer of an 8B in float32."""


def blocks_of(layout: BlockLayout, layers: int, ratio: float, size: float, slots: int) -> int:
    """How many blocks: those of `size` gigabytes (10^9 bytes), or `ratio` times the pool's slots where size is 0."""
    return int(size * 1e9) // (layers * layout.block_bytes) if size else -(-int(ratio * slots) // BLOCK_TOKENS)


class BlockStore:
    """Allocated once; numbers of blocks are given out and taken back, nothing is allocated while serving.

    bytes: per layer uint8 [blocks, layout.block_bytes]. A block is written once, from the KV pool, and read back into
    it. empty(shape): their memory. On a GPU it is pinned, and only kernels of one stream touch it: a block that was
    given back and taken again is written behind whatever still reads it.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(
        self,
        layout: BlockLayout,
        layers: int,
        blocks: int,
        empty: Callable[[tuple[int, int]], torch.Tensor] | None = None,
    ) -> None:
        self.layout, self.blocks = layout, blocks
        empty = empty or functools.partial(torch.empty, dtype=torch.uint8)
        self.bytes = [empty((blocks, layout.block_bytes)) for _ in range(layers)]
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def exact(self) -> bool:
        """What is read back is bit for bit what was written."""
        return self.layout.codec == "native"

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() for t in self.bytes)

    def works_on(self, device: torch.device) -> bool:
        """Whether a block that is written on the device is the one that is read back there. Waits for it."""
        layout = self.layout
        shapes = [(BLOCK_TOKENS, layout.heads, dim) for dim in (layout.k_dim, layout.v_dim)]
        given = [torch.randn(shape, dtype=layout.dtype, device=device) for shape in shapes]
        read, again = ([torch.zeros_like(x) for x in given] for _ in range(2))
        block, count, slots = torch.tensor([0]), torch.tensor([BLOCK_TOKENS]), torch.arange(BLOCK_TOKENS)
        for arena in self.bytes[:1]:
            for source, target in ((given, read), (read, again)):
                encode(layout, source[0], source[1], slots, arena, block, count)
                decode(layout, arena, block, count, target[0], target[1], slots)
        near = all(float((a - b).abs().max()) < 0.5 for a, b in zip(given, read, strict=True))
        return near and all(torch.equal(a, b) for a, b in zip(read, again, strict=True))

    def take(self, count: int) -> list[int]:
        """`count` block numbers; the caller knows that so many are free."""
        assert count <= len(self._free), (count, len(self._free))
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        self._free.extend(blocks)
        assert len(self._free) <= self.blocks, "blocks given back twice"

    def write(
        self,
        blocks: Sequence[int],
        counts: Sequence[int],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        slots: torch.Tensor,
    ) -> None:
        """Block i takes the next counts[i] of `slots` (int64), of every layer's keys and values [slots, heads, dim]."""
        numbers, lengths = _int64(blocks), _int64(counts)
        for store, k, v in zip(self.bytes, keys, values, strict=True):
            encode(self.layout, k, v, slots, store, numbers, lengths)

    def read(
        self,
        blocks: Sequence[int],
        counts: Sequence[int],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        slots: torch.Tensor,
    ) -> None:
        """The reverse: writes K and V of `slots` in every layer."""
        numbers, lengths = _int64(blocks), _int64(counts)
        for store, k, v in zip(self.bytes, keys, values, strict=True):
            decode(self.layout, store, numbers, lengths, k, v, slots)

    def read_layer(
        self,
        layer: int,
        blocks: torch.Tensor,
        counts: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """The same of the store's `layer`-th layer alone, into rows `slots` of keys and values [rows, heads, dim]."""
        decode(self.layout, self.bytes[layer], blocks, counts, keys, values, slots)


class Staging:
    """A history of at most `tokens` tokens, one layer at a time: what attention and compression read in place of
    slots. Allocated once.

    keys, values: [1 + tokens, heads, dim], in the pool's dtype; token i of what is read lies in row 1 + i, row 0 takes
    what nobody asked for. table: int32 [1, tokens], a `req_to_token` whose only row says so.
    """

    def __init__(self, layout: BlockLayout, tokens: int) -> None:
        self.tokens = tokens
        self.keys = torch.zeros(1 + tokens, layout.heads, layout.k_dim, dtype=layout.dtype)
        self.values = torch.zeros(1 + tokens, layout.heads, layout.v_dim, dtype=layout.dtype)
        self.table = torch.arange(1, tokens + 1, dtype=torch.int32)[None]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.table))

    @staticmethod
    def tokens_for(layout: BlockLayout, context_len: int) -> int:
        """The model's longest context, where MOST_STAGED bytes hold it."""
        token = layout.heads * (layout.k_dim + layout.v_dim) * layout.dtype.itemsize
        return min(context_len, MOST_STAGED // token)


def _int64(numbers: Sequence[int]) -> torch.Tensor:
    """Of no numbers, too."""
    return torch.tensor(numbers, dtype=torch.int64)
