"""K and V of tokens as compact blocks of bytes: `native` (bit for bit), `int8`, `int4`.

`layout` says how a block lies, `reference` (torch) what the numbers are, with the error bound. `cpp_impl` (CPU) and
`triton_impl` (GPU) write the same bytes.
"""

from __future__ import annotations

import torch

from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.codec import reference
from keepkv_sglang.kernels.codec.layout import BLOCK_TOKENS, BlockLayout

__all__ = ["BLOCK_TOKENS", "BlockLayout", "decode", "encode"]


def encode(
    layout: BlockLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Writes K and V of one layer's tokens into blocks of the arena.

    keys [S, H, D], values [S, H, Dv]: the pool, of the layout's dtype. slots int64 [n]: the tokens, in order. arena uint8
    [N, block_bytes], contiguous. blocks int64 [B], all different, and counts int64 [B], 1..64, sum n: block i takes the
    next counts[i] tokens. Writes these blocks only; what their unused places hold is undefined. ValueError for anything
    else, IndexError for a slot or block that does not exist.
    """
    kernel = _kernel(layout, keys, values)
    kernel.encode(layout, keys, values, slots, arena, blocks, counts)


def decode(
    layout: BlockLayout,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """The reverse: writes keys[slots] and values[slots], all different, from blocks that hold counts tokens each.

    Encoding again what decode wrote, with the same counts, gives the same bytes.
    """
    kernel = _kernel(layout, keys, values)
    kernel.decode(layout, arena, blocks, counts, keys, values, slots)


def _kernel(layout, keys, values):
    kernel = None
    return kernel if kernel is not None and kernel.supports(layout, keys, values) else reference
