"""K and V of tokens as compact blocks of bytes: `native` (bit for bit), `int8`, `int4`.

`layout` says how a block lies, `reference` (torch) what the numbers are, with the error bound. `cpp_impl` (CPU) and
`triton_impl` (GPU) write the same bytes.
"""

from __future__ import annotations

import torch

from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.codec import reference
from keepkv_sglang.kernels.codec.layout import BLOCK_TOKENS, BlockLayout
from keepkv_sglang.kernels.host import on_device

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

    keys [S, H, D], values [S, H, Dv]: the pool, of the layout's dtype. slots int64 [n]: the tokens, in order. arena
    uint8 [N, block_bytes], contiguous. blocks int64 [B], all different, and counts int64 [B], 1..64, sum n: block i
    takes the next counts[i] tokens. Writes these blocks only; what their unused places hold is undefined. ValueError
    for anything else, IndexError for a slot or block that does not exist (on a GPU neither is looked for).

    The arena may be in host memory while the pool is on a GPU. Where it is pinned the GPU writes it itself, in the
    stream's order, and nobody waits; else blocks are made on the GPU and copied. slots, blocks and counts may be on
    either.
    """
    device = keys.device
    slots, counts = on_device(slots, device), on_device(counts, device)
    kernel = _kernel(layout, keys, values)
    if _reaches(device, arena):
        kernel.encode(layout, keys, values, slots, arena, on_device(blocks, device), counts)
        return
    made = torch.zeros(len(blocks), layout.block_bytes, dtype=torch.uint8, device=device)
    kernel.encode(layout, keys, values, slots, made, torch.arange(len(blocks), device=device), counts)
    arena[blocks.to(arena.device)] = made.to(arena.device)


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

    Encoding again what decode wrote, with the same counts, gives the same bytes; the exceptions of int4: reference.py.
    """
    device = keys.device
    if not _reaches(device, arena):
        arena, blocks = arena[blocks.to(arena.device)].to(device), torch.arange(len(blocks))
    blocks, counts, slots = (on_device(x, device) for x in (blocks, counts, slots))
    _kernel(layout, keys, values).decode(layout, arena, blocks, counts, keys, values, slots)


def _reaches(device: torch.device, arena: torch.Tensor) -> bool:
    """Whether a kernel on the device can use the arena where it lies."""
    return arena.device == device or (device.type == "cuda" and choose.gpu_kernel() == "triton" and arena.is_pinned())


def _kernel(layout: BlockLayout, keys: torch.Tensor, values: torch.Tensor):
    kernel = choose.implementation("codec", keys)
    return kernel if kernel is not None and kernel.supports(layout, keys, values) else reference
