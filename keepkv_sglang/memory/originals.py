"""Host memory for the originals of compressed tokens: blocks of up to 64 tokens, of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keepkv_sglang.kernels.codec import BLOCK_TOKENS, BlockLayout, decode, encode


def blocks_of(layout: BlockLayout, layers: int, ratio: float, size: float, slots: int) -> int:
    """How many blocks: those of `size` gigabytes (10^9 bytes), or `ratio` times the pool's slots where size is 0."""
    return int(size * 1e9) // (layers * layout.block_bytes) if size else -(-int(ratio * slots) // BLOCK_TOKENS)


class BlockStore:
    """Allocated once; numbers of blocks are given out and taken back, nothing is allocated while serving.

    bytes: per layer uint8 [blocks, layout.block_bytes]. A block is written once, from the KV pool, and read back into
    it.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(self, layout: BlockLayout, layers: int, blocks: int) -> None:
        self.layout, self.blocks = layout, blocks
        self.bytes = [torch.empty(blocks, layout.block_bytes, dtype=torch.uint8) for _ in range(layers)]
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


def _int64(numbers: Sequence[int]) -> torch.Tensor:
    """Of no numbers, too."""
    return torch.tensor(numbers, dtype=torch.int64)
