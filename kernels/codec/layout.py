"""How K and V of up to 64 tokens of one layer lie in a block of bytes, and what is checked of a call.

A block is cut into one part per kv head, a part into four regions, in this order:

    region    native             int8                int4
    k_meta    nothing            scale [64]          zero [D], scale [D]
    v_meta    nothing            scale [64]          zero [G, 64], scale [G, 64]
    k         pool dtype [64, D] int8 [64, D]        uint8 [64, D / 2]
    v         pool dtype [64, Dv] int8 [64, Dv]      uint8 [64, Dv / 2]

Scales and zeros are float16. G = ceil(Dv / 32): a token's values in groups of 32 channels, the last one shorter where
32 does not divide Dv (80: 32, 32, 16). A byte of int4 holds channel j in its low and j + D / 2 in its high four bits.
A block of c < 64 tokens fills the first c rows, and leaves the others as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK_TOKENS = 64
GROUP = 32
CODECS = ("native", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    """Bytes of the four regions of one head's part of a block."""

    k_meta: int
    v_meta: int
    k: int
    v: int


@dataclass(frozen=True)
class BlockLayout:
    """How one block of at most 64 tokens of one layer lies in bytes.

    codec: "native", "int8" or "int4". heads: kv heads (of this rank). k_dim, v_dim: numbers per vector. dtype: the
    pool's, float32, bfloat16 or float16. ValueError for another codec or dtype, a size below 1, an odd k_dim or v_dim
    with int4.
    """

    codec: str
    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"unknown codec {self.codec!r}: choose one of {', '.join(CODECS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"a codec stores float32, bfloat16 or float16, not {self.dtype}")
        if min(self.heads, self.k_dim, self.v_dim) < 1:
            raise ValueError(f"heads, k_dim and v_dim must be positive, got {self}")
        if self.codec == "int4" and (self.k_dim % 2 or self.v_dim % 2):
            raise ValueError(f"int4 stores two channels a byte: k_dim {self.k_dim} and v_dim {self.v_dim} must be even")

    @property
    def groups(self) -> int:
        """Groups of at most 32 channels of a token's values (int4)."""
        return -(-self.v_dim // GROUP)

    @property
    def sizes(self) -> Sizes:
        if self.codec == "native":
            return Sizes(0, 0, *(BLOCK_TOKENS * dim * self.dtype.itemsize for dim in (self.k_dim, self.v_dim)))
        if self.codec == "int8":
            return Sizes(2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS, BLOCK_TOKENS * self.k_dim, BLOCK_TOKENS * self.v_dim)
        per_group = 4 * BLOCK_TOKENS * self.groups
        return Sizes(4 * self.k_dim, per_group, BLOCK_TOKENS * self.k_dim // 2, BLOCK_TOKENS * self.v_dim // 2)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's part."""
        return sum(self.sizes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, whatever number of tokens it holds."""
        return self.heads * self.head_bytes


def check(
    layout: BlockLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """ValueError for shapes and dtypes that do not belong together."""
    shapes = (tuple(keys.shape[1:]), tuple(values.shape), tuple(arena.shape[1:]), tuple(blocks.shape))
    heads = layout.heads
    wanted = ((heads, layout.k_dim), (len(keys), heads, layout.v_dim), (layout.block_bytes,), tuple(counts.shape))
    if shapes != wanted or slots.dim() != 1 or counts.dim() != 1:
        raise ValueError(f"{layout} wants keys[0], values, arena[0], blocks of shapes {wanted}, got {shapes}")
    if keys.dtype != layout.dtype or values.dtype != layout.dtype or arena.dtype != torch.uint8:
        raise ValueError(f"{layout} does not read {keys.dtype}, {values.dtype} with an arena of {arena.dtype}")
    if any(x.dtype != torch.int64 for x in (slots, blocks, counts)):
        raise ValueError("slots, blocks and counts are int64")
    if not arena.is_contiguous():
        raise ValueError(f"an arena is contiguous, got strides {arena.stride()}")


def check_numbers(
    keys: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor, blocks: torch.Tensor, counts: torch.Tensor
) -> None:
    """IndexError for a slot outside the pool or a block outside the arena; ValueError for counts that are not 1..64 or
    not as many as there are slots. Waits for a GPU."""
    if len(counts) and not 1 <= int(counts.min()) <= int(counts.max()) <= BLOCK_TOKENS:
        raise ValueError(f"a block holds 1 to {BLOCK_TOKENS} tokens, got counts {counts.tolist()}")
    if int(counts.sum()) != len(slots):
        raise ValueError(f"blocks of {int(counts.sum())} tokens for {len(slots)} slots")
    for name, x, end in (("slot", slots, len(keys)), ("block", blocks, len(arena))):
        if len(x) and not 0 <= int(x.min()) <= int(x.max()) < end:
            raise IndexError(f"{name} {int(x.min())}..{int(x.max())} outside 0..{end - 1}")
