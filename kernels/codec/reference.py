"""The codecs in torch: the oracle of the others, and what computes where they cannot. Arithmetic is float32.

A value x is stored as q and read as the pool's dtype's rounding of zero + q * scale (int8: zero is 0). q is the nearest
integer to (x - zero) / scale, of -127..127 or 0..15, for the zero and scale that are stored, after their rounding.

int8, per token and head: a = max |x|, scale from a / 127. int4, per channel of the block (K) or group of a token (V):
zero = min rounded down to float16 (below 2^-14 to the nearest), scale from (max - zero) / 15.

scale: the quotient rounded up to float16; below 2^-14, where float16 loses digits, up to a power of two. Where the
number below it, or 2^-14, read back and rounded to the pool's dtype, still reaches the largest value, that one: so the
largest value that decode writes gives the same scale again. All values within 2^-25 of zero: scale 0.

Error, before the rounding to the pool's dtype: |zero + q * scale - x| <= scale / 2 (1 + 2^-12), where 2^-12 is what
float32 rounds; 2^-25 where scale is 0. Beyond float16's range (|x| > 65504 with int4, 127 * 65504 with int8) zero and
scale saturate and x is clipped to what they reach.

Again: encoding what decode wrote, with the same counts, gives the same bytes, up to these limits. Not so int4 where
scale <= 2^-9 |zero|, that is where a channel's or group's values differ by less than 3 % of their size: zero may have
been rounded down by more than half a step, so that min is not read as zero, and the next round may find another one. It
then moves a value by 2^-10 |zero| at most, or a unit of the pool dtype's last digit. Rare in 16-bit pools.

NaN and infinities become 0, except in native, which copies bits.
"""

from __future__ import annotations

import torch

from .layout import BLOCK_TOKENS, GROUP, BlockLayout, check, check_numbers

F16_MAX = 65504.0
F16_NORMAL = 2.0**-14  # the smallest number with all digits of float16
F16_TINY = 2.0**-24  # the smallest number


def encode(
    layout: BlockLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """As codec.encode; any device, the same for all tensors."""
    check(layout, keys, values, slots, arena, blocks, counts)
    check_numbers(keys, slots, arena, blocks, counts)
    if not len(blocks):
        return
    used, token = _places(counts)
    rows = slots[token.clamp(max=len(slots) - 1)]
    parts = arena[blocks]
    k_meta, v_meta, k, v = _regions(layout, parts)
    used = used[:, None, :, None]
    x = [pool[rows].transpose(1, 2) for pool in (keys, values)]  # [B, H, 64, D]
    if layout.codec == "native":
        for region, pool in zip((k, v), x, strict=True):
            _write(region, _bytes(pool), used)
    elif layout.codec == "int8":
        for region, meta, pool in zip((k, v), (k_meta, v_meta), x, strict=True):
            finite = _finite(pool)
            scale = symmetric_scale(finite.abs().amax(3, keepdim=True), layout.dtype)
            q = (finite * _inverse(scale)).clamp(-127, 127).round().to(torch.int8)
            _write(meta.unflatten(2, (BLOCK_TOKENS, 2)), _bytes(scale.half()), used)
            _write(region, q.view(torch.uint8), used)
    else:
        finite = _finite(x[0])
        inf = finite.new_tensor(torch.inf)
        low = torch.where(used, finite, inf).amin(2, keepdim=True)
        high = torch.where(used, finite, -inf).amax(2, keepdim=True)
        zero, scale = asymmetric(low, high, layout.dtype)
        _write(k, _pack((finite - zero) * _inverse(scale)), used)
        k_meta.copy_(torch.cat([_bytes(m.half()).flatten(2) for m in (zero, scale)], 2))
        finite = _finite(x[1])
        cut = finite.split(GROUP, 3)
        low, high = (torch.cat([getattr(g, f)(3, keepdim=True) for g in cut], 3) for f in ("amin", "amax"))
        zero, scale = asymmetric(low, high, layout.dtype)
        spread = [m.repeat_interleave(GROUP, 3)[..., : layout.v_dim] for m in (zero, _inverse(scale))]
        _write(v, _pack((finite - spread[0]) * spread[1]), used)
        for meta, m in zip(v_meta.chunk(2, 2), (zero, scale), strict=True):
            rows = _bytes(m.half().transpose(2, 3)).unflatten(3, (BLOCK_TOKENS, 2))
            _write(meta.unflatten(2, rows.shape[2:]), rows, used.unsqueeze(2))
    arena[blocks] = parts


def decode(
    layout: BlockLayout,
    arena: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """As codec.decode; any device, the same for all tensors."""
    check(layout, keys, values, slots, arena, blocks, counts)
    check_numbers(keys, slots, arena, blocks, counts)
    if not len(blocks):
        return
    k_meta, v_meta, k, v = _regions(layout, arena[blocks])
    if layout.codec == "native":
        x = [_numbers(region, layout.dtype) for region in (k, v)]
    elif layout.codec == "int8":
        x = [
            region.view(torch.int8).float() * _numbers(meta, torch.float16).float().unsqueeze(3)
            for region, meta in ((k, k_meta), (v, v_meta))
        ]
    else:
        zero, scale = _numbers(k_meta, torch.float16).float().unsqueeze(2).chunk(2, 3)
        x = [zero + _unpack(k) * scale]
        pairs = _numbers(v_meta, torch.float16).float().unflatten(2, (2, -1, BLOCK_TOKENS)).transpose(3, 4)
        zero, scale = pairs.repeat_interleave(GROUP, 4)[..., : layout.v_dim].unbind(2)
        x.append(zero + _unpack(v) * scale)
    used = _places(counts)[0]
    for pool, numbers in zip((keys, values), x, strict=True):
        if layout.dtype == torch.float16:  # what rounds up beyond it would be read as infinite
            numbers = numbers.clamp(-F16_MAX, F16_MAX) if numbers.dtype == torch.float32 else numbers
        pool[slots] = numbers.transpose(1, 2)[used].to(layout.dtype)


def symmetric_scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale of int8, float32 that float16 holds, for the largest magnitude (float32 >= 0) of a token's head."""
    return _scale(_divided(largest, 127), lambda scale: (127 * scale).to(dtype).float() >= largest, largest)


def asymmetric(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(zero, scale) of int4, float32 that float16 holds, for values (float32) between low and high."""
    zero = _round_down(low)
    span = high - zero
    return zero, _scale(_divided(span, 15), lambda scale: (zero + 15 * scale).to(dtype).float() >= high, span)


def _divided(x, steps):
    """x / steps, rounded once. By a Python number torch multiplies on a GPU with the rounded reciprocal."""
    return x / torch.full_like(x, steps)


def _scale(quotient, reaches, span):
    small = quotient < F16_NORMAL
    bits = quotient.view(torch.int32)
    digits = torch.where(small, 0x7FFFFF, 0x1FFF).int()  # of float32's, those that go
    up = ((bits + digits) & ~digits).view(torch.float32).clamp(min=F16_TINY)
    step = torch.where(up <= F16_NORMAL, 0x800000, 0x2000).int()
    below = (up.view(torch.int32) - step).view(torch.float32)
    found = torch.where(reaches(below) & (up > F16_TINY), below, up).clamp(max=F16_MAX)
    normal = torch.full_like(up, F16_NORMAL)  # which may have been reached by more than one step of those above it
    found = torch.where((up > normal) & reaches(normal), normal, found)
    return torch.where(span <= F16_TINY / 2, 0.0, found)


def _round_down(x):
    """The float16 at or below x, as float32; below 2^-14 in magnitude the nearest one. Never -0."""
    bits = x.view(torch.int32)
    cut = torch.where(x < 0, (bits + 0x1FFF) & ~0x1FFF, bits & ~0x1FFF).view(torch.float32)
    small = (x / F16_TINY).round() * F16_TINY
    return torch.where(x.abs() < F16_NORMAL, small, cut).clamp(-F16_MAX, F16_MAX) + 0.0


def _inverse(scale):
    return torch.where(scale > 0, 1 / scale, 0.0)


def _finite(x):
    return torch.where(x.isfinite(), x, 0).float()


def _pack(q):
    q = q.clamp(0, 15).round().to(torch.uint8)
    low, high = q.chunk(2, 3)
    return low | (high << 4)


def _unpack(x):
    return torch.cat([x & 15, x >> 4], 3).float()


def _places(counts):
    """used [B, 64] bool: which rows of the blocks are tokens; token [B, 64]: the number of each among the slots."""
    place = torch.arange(BLOCK_TOKENS, device=counts.device)
    return place < counts[:, None], (counts.cumsum(0) - counts)[:, None] + place


def _regions(layout, parts):
    """Views of parts [B, block_bytes]: k_meta and v_meta [B, H, bytes], k and v [B, H, 64, bytes]."""
    k_meta, v_meta, k, v = parts.view(len(parts), layout.heads, -1).split(layout.sizes, 2)
    return k_meta, v_meta, k.unflatten(2, (BLOCK_TOKENS, -1)), v.unflatten(2, (BLOCK_TOKENS, -1))


def _bytes(x):
    return x.contiguous().view(torch.uint8)


def _numbers(x, dtype):
    return x.contiguous().view(dtype)


def _write(region, found, used):
    region.copy_(torch.where(used, found, region))
