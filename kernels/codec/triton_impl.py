"""The codecs in Triton: the bytes and numbers of reference.py, bit for bit. One program per block and head.

enable_fp_fusion=False: torch multiplies and adds with two roundings, so must these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .layout import BLOCK_TOKENS, GROUP, BlockLayout, check

TOKENS = tl.constexpr(BLOCK_TOKENS)
GROUP_CHANNELS = tl.constexpr(GROUP)
F16_MAX = tl.constexpr(65504.0)
F16_NORMAL = tl.constexpr(2.0**-14)
F16_TINY = tl.constexpr(2.0**-24)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer


@triton.jit
def _nearest(x):
    return (x + MAGIC) - MAGIC


@triton.jit
def _clamped(x, low, high):
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def _inverse(scale):
    some = scale > 0
    return tl.where(some, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(some, scale, 1.0)), 0.0)


@triton.jit
def _scale(span, zero, largest, STEPS: tl.constexpr, dtype: tl.constexpr):
    """_scale of reference.py, for spans that STEPS steps cover from zero to largest."""
    quotient = tl.div_rn(span, tl.full(span.shape, STEPS, tl.float32))
    digits = tl.where(quotient < F16_NORMAL, 0x7FFFFF, 0x1FFF)
    up = ((quotient.to(tl.int32, bitcast=True) + digits) & ~digits).to(tl.float32, bitcast=True)
    up = tl.maximum(up, F16_TINY)
    step = tl.where(up <= F16_NORMAL, 0x800000, 0x2000)
    below = (up.to(tl.int32, bitcast=True) - step).to(tl.float32, bitcast=True)
    reaches = (zero + STEPS * below).to(dtype).to(tl.float32) >= largest
    found = tl.minimum(tl.where(reaches & (up > F16_TINY), below, up), F16_MAX)
    # 2^-14 may have been reached by more than one step of those above it.
    reaches = (zero + STEPS * F16_NORMAL).to(dtype).to(tl.float32) >= largest
    found = tl.where(reaches & (up > F16_NORMAL), F16_NORMAL, found)
    return tl.where(span <= F16_TINY / 2, 0.0, found)


@triton.jit
def _round_down(x):
    """_round_down of reference.py."""
    bits = x.to(tl.int32, bitcast=True)
    cut = (tl.where(x < 0, bits + 0x1FFF, bits) & ~0x1FFF).to(tl.float32, bitcast=True)
    small = _nearest(x * 16777216.0) * F16_TINY  # 2^24
    return _clamped(tl.where(tl.abs(x) < F16_NORMAL, small, cut), -F16_MAX, F16_MAX) + 0.0


@triton.jit
def _finite(x):
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _program(
    slots_ptr, first_ptr, counts_ptr, blocks_ptr, pool_ptr, stride_slot, stride_head, HEAD_BYTES: tl.constexpr
):
    """Of this program: its rows' addresses in the pool [64, 1], which of them are tokens, and where its part of the
    block begins in the arena."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, TOKENS)
    used = place < tl.load(counts_ptr + block)
    slot = tl.load(slots_ptr + tl.load(first_ptr + block) + place, mask=used, other=0)
    part = (tl.load(blocks_ptr + block) * tl.num_programs(1) + head) * HEAD_BYTES
    return pool_ptr + (head * stride_head + slot * stride_slot)[:, None], used[:, None], part


@triton.jit
def copy_kernel(
    pool_ptr, arena_ptr, slots_ptr, first_ptr, counts_ptr, blocks_ptr, stride_slot, stride_head,
    HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ENCODE: tl.constexpr,
):  # fmt: skip
    """pool and arena as integers of the pool's width; HEAD_SIZE and ROWS in these."""
    row, used, part = _program(
        slots_ptr, first_ptr, counts_ptr, blocks_ptr, pool_ptr, stride_slot, stride_head, HEAD_SIZE
    )
    d, place = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, TOKENS)[:, None]
    mask = used & (d < DIM)
    stored = arena_ptr + part + ROWS + place * DIM + d
    if ENCODE:
        tl.store(stored, tl.load(row + d, mask=mask), mask=mask)
    else:
        tl.store(row + d, tl.load(stored, mask=mask), mask=mask)


@triton.jit
def int8_kernel(
    pool_ptr, arena_ptr, half_ptr, slots_ptr, first_ptr, counts_ptr, blocks_ptr, stride_slot, stride_head,
    HEAD_SIZE: tl.constexpr, META: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ENCODE: tl.constexpr,
):  # fmt: skip
    """arena int8, half the same bytes as float16; HEAD_SIZE, META and ROWS in bytes."""
    row, used, part = _program(
        slots_ptr, first_ptr, counts_ptr, blocks_ptr, pool_ptr, stride_slot, stride_head, HEAD_SIZE
    )
    d, place = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, TOKENS)[:, None]
    mask = used & (d < DIM)
    meta, stored = half_ptr + (part + META) // 2 + place, arena_ptr + part + ROWS + place * DIM + d
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    if ENCODE:
        x = _finite(tl.load(row + d, mask=mask, other=0.0))
        largest = tl.max(tl.abs(x), 1)[:, None]
        scale = _scale(largest, tl.zeros_like(largest), largest, 127.0, dtype)
        tl.store(meta, scale.to(tl.float16), mask=used)
        tl.store(stored, _nearest(_clamped(x * _inverse(scale), -127.0, 127.0)).to(tl.int8), mask=mask)
    else:
        scale = tl.load(meta, mask=used, other=0.0).to(tl.float32)
        x = tl.load(stored, mask=mask, other=0).to(tl.float32) * scale
        tl.store(row + d, _stored(x, dtype), mask=mask)


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """What rounds up beyond float16's range would be read as infinite."""
    if dtype == tl.float16:
        x = _clamped(x, -F16_MAX, F16_MAX)
    return x.to(dtype)


@triton.jit
def _four_bits(x, zero, scale):
    return _nearest(_clamped((x - zero) * _inverse(scale), 0.0, 15.0)).to(tl.int32)


@triton.jit
def int4_keys_kernel(
    pool_ptr, arena_ptr, half_ptr, slots_ptr, first_ptr, counts_ptr, blocks_ptr, stride_slot, stride_head,
    HEAD_SIZE: tl.constexpr, META: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
    ENCODE: tl.constexpr,
):  # fmt: skip
    """arena uint8, half the same bytes as float16; HEAD_SIZE, META and ROWS in bytes; PAIRS = D / 2."""
    row, used, part = _program(
        slots_ptr, first_ptr, counts_ptr, blocks_ptr, pool_ptr, stride_slot, stride_head, HEAD_SIZE
    )
    d, place = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, TOKENS)[:, None]
    inside = d < PAIRS
    mask = used & inside
    meta, stored = half_ptr + (part + META) // 2 + d, arena_ptr + part + ROWS + place * PAIRS + d
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    packed = tl.zeros([TOKENS, BLOCK_P], tl.int32)
    if not ENCODE:
        packed = tl.load(stored, mask=mask, other=0).to(tl.int32)
    for half in tl.static_range(2):  # channels below and from D / 2
        zero_at, scale_at = meta + half * PAIRS, meta + (2 + half) * PAIRS
        if ENCODE:
            x = _finite(tl.load(row + half * PAIRS + d, mask=mask, other=0.0))
            low = tl.min(tl.where(mask, x, float("inf")), 0)[None, :]
            high = tl.max(tl.where(mask, x, float("-inf")), 0)[None, :]
            low, high = tl.where(inside, low, 0.0), tl.where(inside, high, 0.0)
            zero = _round_down(low)
            scale = _scale(high - zero, zero, high, 15.0, dtype)
            tl.store(zero_at, zero.to(tl.float16), mask=inside)
            tl.store(scale_at, scale.to(tl.float16), mask=inside)
            packed |= _four_bits(x, zero, scale) << (4 * half)
        else:
            zero = tl.load(zero_at, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)
            x = zero + ((packed >> (4 * half)) & 15).to(tl.float32) * scale
            tl.store(row + half * PAIRS + d, _stored(x, dtype), mask=mask)
    if ENCODE:
        tl.store(stored, packed.to(tl.uint8), mask=mask)


@triton.jit
def int4_values_kernel(
    pool_ptr, arena_ptr, half_ptr, slots_ptr, first_ptr, counts_ptr, blocks_ptr, stride_slot, stride_head,
    HEAD_SIZE: tl.constexpr, META: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
    GROUPS: tl.constexpr, ENCODE: tl.constexpr,
):  # fmt: skip
    """As int4_keys_kernel. A group may have channels in both halves, so both are held."""
    row, used, part = _program(
        slots_ptr, first_ptr, counts_ptr, blocks_ptr, pool_ptr, stride_slot, stride_head, HEAD_SIZE
    )
    d, place = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, TOKENS)[:, None]
    inside = d < PAIRS
    mask = used & inside
    meta, stored = half_ptr + (part + META) // 2 + place, arena_ptr + part + ROWS + place * PAIRS + d
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    # Groups of the channels of the lower and the upper half; no group beside them.
    lower = tl.where(inside, d // GROUP_CHANNELS, -1)
    upper = tl.where(inside, (d + PAIRS) // GROUP_CHANNELS, -1)
    if ENCODE:
        a = _finite(tl.load(row + d, mask=mask, other=0.0))
        b = _finite(tl.load(row + PAIRS + d, mask=mask, other=0.0))
        p, q = tl.zeros([TOKENS, BLOCK_P], tl.int32), tl.zeros([TOKENS, BLOCK_P], tl.int32)
        for g in tl.static_range(GROUPS):
            low = tl.minimum(tl.where(lower == g, a, float("inf")), tl.where(upper == g, b, float("inf")))
            high = tl.maximum(tl.where(lower == g, a, float("-inf")), tl.where(upper == g, b, float("-inf")))
            low, high = tl.min(low, 1)[:, None], tl.max(high, 1)[:, None]
            zero = _round_down(low)
            scale = _scale(high - zero, zero, high, 15.0, dtype)
            tl.store(meta + g * TOKENS, zero.to(tl.float16), mask=used)
            tl.store(meta + (GROUPS + g) * TOKENS, scale.to(tl.float16), mask=used)
            p = tl.where(lower == g, _four_bits(a, zero, scale), p)
            q = tl.where(upper == g, _four_bits(b, zero, scale), q)
        tl.store(stored, (p | (q << 4)).to(tl.uint8), mask=mask)
    else:
        packed = tl.load(stored, mask=mask, other=0).to(tl.int32)
        for half in tl.static_range(2):
            at = meta + (d + half * PAIRS) // GROUP_CHANNELS * TOKENS
            zero = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            scale = tl.load(at + GROUPS * TOKENS, mask=mask, other=0.0).to(tl.float32)
            x = zero + ((packed >> (4 * half)) & 15).to(tl.float32) * scale
            tl.store(row + half * PAIRS + d, _stored(x, dtype), mask=mask)


def encode(
    layout: BlockLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """As codec.encode. Numbers of slots, blocks and counts are not checked: that would wait for the GPU."""
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
    """As codec.decode. Numbers of slots, blocks and counts are not checked: that would wait for the GPU."""
    _run(False, layout, keys, values, slots, arena, blocks, counts)


def supports(layout: BlockLayout, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Pools whose vectors are contiguous."""
    return all(x.stride(2) == 1 for x in (keys, values))


def _run(encoding: bool, layout, keys, values, slots, arena, blocks, counts) -> None:
    check(layout, keys, values, slots, arena, blocks, counts)
    if not supports(layout, keys, values):
        raise ValueError(f"vectors must be contiguous, got strides {keys.stride()} and {values.stride()}")
    if not len(blocks):
        return
    where = [x.contiguous() for x in (slots, counts.cumsum(0) - counts, counts, blocks)]
    grid, sizes = (len(blocks), layout.heads), layout.sizes
    meta, rows = (0, sizes.k_meta), (sizes.k_meta + sizes.v_meta, sizes.k_meta + sizes.v_meta + sizes.k)
    for i, pool in enumerate((keys, values)):
        dim = pool.shape[2]
        strides = pool.stride()[:2]
        options = dict(ENCODE=encoding, num_warps=4 if dim <= 128 else 8, num_stages=1, enable_fp_fusion=False)
        if layout.codec == "native":
            width = layout.dtype.itemsize
            kind = torch.int32 if width == 4 else torch.int16
            copy_kernel[grid](
                pool.view(kind), arena.view(kind), *where, *strides, HEAD_SIZE=layout.head_bytes // width,
                ROWS=rows[i] // width, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), **options,
            )  # fmt: skip
            continue
        tensors = (arena.view(torch.float16), *where, *strides)
        places = dict(HEAD_SIZE=layout.head_bytes, META=meta[i], ROWS=rows[i])
        if layout.codec == "int8":
            block = triton.next_power_of_2(dim)
            int8_kernel[grid](pool, arena.view(torch.int8), *tensors, **places, DIM=dim, BLOCK_D=block, **options)
            continue
        places |= dict(PAIRS=dim // 2, BLOCK_P=triton.next_power_of_2(dim // 2))
        if i == 0:
            int4_keys_kernel[grid](pool, arena, *tensors, **places, **options)
        else:
            int4_values_kernel[grid](pool, arena, *tensors, **places, GROUPS=layout.groups, **options)
