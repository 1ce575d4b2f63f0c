"""The codecs in C++ (cpu_codec.cpp): the bytes and numbers of reference.py, bit for bit.

One head's part of one block is one work unit of torch.get_num_threads() threads.
"""

from __future__ import annotations

import ctypes

import torch

from keepkv_sglang.kernels import cpu_build
from keepkv_sglang.kernels.codec.layout import BLOCK_TOKENS, CODECS, DTYPES, BlockLayout, check

_POINTERS = ("keys", "values", "slots", "blocks", "counts", "arena")
_SIZES = (
    *("k_token", "k_head", "v_token", "v_head", "pool_slots", "arena_blocks", "tokens", "used_blocks"),
    *("heads", "k_dim", "v_dim", "k_meta", "v_meta", "k_bytes", "v_bytes", "codec", "threads"),
)
_MAX_DIM = 1024  # kMaxDim of cpu_codec.cpp


class _Args(ctypes.Structure):
    _fields_ = [(field, ctypes.c_void_p) for field in _POINTERS] + [(field, ctypes.c_int64) for field in _SIZES]


_function = cpu_build.load(cpu_build.build("codec"), "keepkv_codec")  # at import: the caller falls back to torch
_function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]  # type: ignore[attr-defined]


def encode(
    layout: BlockLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """As codec.encode; ValueError for a pool that supports() refuses."""
    _run(True, layout, keys, values, slots, arena, blocks, counts)


def decode(
    layout: BlockLayout,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """As codec.decode; ValueError for a pool that supports() refuses."""
    _run(False, layout, keys, values, slots, arena, blocks, counts)


def supports(layout: BlockLayout, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Pools on a CPU whose vectors are contiguous, of 16, 32, ... up to 1024 numbers (native: of any size)."""
    packed = all(x.is_cpu and x.stride(2) == 1 for x in (keys, values))
    return packed and (
        layout.codec == "native" or all(d % 16 == 0 and d <= _MAX_DIM for d in (layout.k_dim, layout.v_dim))
    )


def _run(encoding: bool, layout, keys, values, slots, arena, blocks, counts) -> None:
    check(layout, keys, values, slots, arena, blocks, counts)
    if not supports(layout, keys, values) or not all(x.is_cpu for x in (slots, arena, blocks, counts)):
        raise ValueError(f"on a CPU {layout} needs contiguous vectors of 16, 32, ... {_MAX_DIM} numbers")
    slots, blocks, counts = slots.contiguous(), blocks.contiguous(), counts.contiguous()
    pointers = (keys, values, slots, blocks, counts, arena)
    strides = (*keys.stride()[:2], *values.stride()[:2])
    sizes = (len(keys), len(arena), len(slots), len(blocks), layout.heads, layout.k_dim, layout.v_dim, *layout.sizes)
    codec, threads = CODECS.index(layout.codec), torch.get_num_threads()
    args = _Args(*(x.data_ptr() for x in pointers), *strides, *sizes, codec, threads)
    code = _function(ctypes.addressof(args), DTYPES.index(layout.dtype), encoding)
    cpu_build.raise_for(code)
    if code:
        _raise(code, keys, arena)


def _raise(code: int, keys: torch.Tensor, arena: torch.Tensor) -> None:
    """For kBadCounts, kBadSlot and kBadBlock of cpu_codec.cpp."""
    if code == 4:
        raise ValueError(f"a block holds 1 to {BLOCK_TOKENS} tokens, all blocks together as many as there are slots")
    name, end = ("slot", len(keys)) if code == 5 else ("block", len(arena))
    raise IndexError(f"a {name} outside 0..{end - 1}")
