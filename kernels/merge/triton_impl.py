"""Matching, merging and gathering of KV slots in Triton: drop-ins for torch_impl and compress/rules/base.py.

`nearest_kept`, `merge_segments` and `gather_slots` have the meaning of those in torch_impl, and are equal to them up to
the order of float32 sums (gather_slots: bit for bit).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .torch_impl import Segments

_KEYS = (torch.float32, torch.bfloat16, torch.float16)
EPS = tl.constexpr(1e-12)  # of torch.nn.functional.normalize, and of torch_impl.nearest_kept


@triton.jit(do_not_specialize=["r", "u", "blocks"])
def nearest_kernel(
    k_ptr, dropped_ptr, kept_ptr, allowed_ptr, ends_ptr, best_ptr, column_ptr, r, u, blocks, within,
    stride_kh, stride_kn,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (tile of dropped tokens, head): maximum over the allowed kept tokens of the same block of `within`
    tokens, the lower column on a tie. ends [H, blocks + 1]: where each block begins among the kept tokens. Products of
    16-bit keys are exact in float32, so those are multiplied as they are and their lengths divided out."""
    head = tl.program_id(1).to(tl.int64)
    i, d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    mask_r, mask_d = i < r, d < DIM
    token = tl.load(dropped_ptr + head * r + i, mask=mask_r, other=0)
    block = tl.where(mask_r, (token // within).to(tl.int32), -1)
    rows = tl.load(
        k_ptr + head * stride_kh + token[:, None] * stride_kn + d[None, :],
        mask=mask_r[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    length = tl.maximum(tl.sqrt(tl.sum(rows.to(tl.float32) * rows.to(tl.float32), 1)), EPS)
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    column = tl.zeros([BLOCK_R], tl.int32)
    lowest = tl.min(tl.where(mask_r, block, blocks - 1), 0)
    first = tl.load(ends_ptr + head * (blocks + 1) + lowest)
    last = tl.load(ends_ptr + head * (blocks + 1) + tl.max(block, 0) + 1)
    for start in range(first, last, BLOCK_U):
        j = start + tl.arange(0, BLOCK_U)
        allowed = tl.load(allowed_ptr + head * u + j, mask=j < u, other=0) != 0
        target = tl.load(kept_ptr + head * u + j, mask=j < u, other=0)
        keys = tl.load(
            k_ptr + head * stride_kh + target[None, :] * stride_kn + d[:, None],
            mask=(j < u)[None, :] & mask_d[:, None], other=0.0,
        )  # fmt: skip
        size = tl.maximum(tl.sqrt(tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 0)), EPS)
        if UPCAST:  # divided before the product: behind it, float32 spills
            unit = keys.to(tl.float32) / size[None, :]
            similarity = tl.dot(rows.to(tl.float32), unit, input_precision="ieee")
        else:
            similarity = tl.dot(rows, keys) / size[None, :]
        same = (target // within).to(tl.int32)[None, :] == block[:, None]
        # A NaN is nobody's nearest; what tl.max makes of one, compiled and interpreted, differs.
        good = allowed[None, :] & same & (similarity == similarity)
        similarity = tl.where(good, similarity, float("-inf"))
        top, at = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
        column = tl.where(top > best, start + at, column)
        best = tl.maximum(top, best)
    tl.store(best_ptr + head * r + i, best / length, mask=mask_r)
    tl.store(column_ptr + head * r + i, column.to(tl.int64), mask=mask_r)


@triton.jit
def merge_kernel(
    k_ptr, v_ptr, lv_ptr, log_w_ptr, rows_ptr, offsets_ptr, counts_ptr, out_k_ptr, out_v_ptr, out_lv_ptr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (cluster): softmax-weighted means of its members' keys and values, log of the sum of their votes."""
    cluster = tl.program_id(0).to(tl.int64)
    first, count = tl.load(offsets_ptr + cluster), tl.load(counts_ptr + cluster).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    top_w = tl.full([1], float("-inf"), tl.float32)
    top_lv = tl.full([1], float("-inf"), tl.float32)
    total_w, total_lv = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    k, v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        member = t < count
        row = tl.load(rows_ptr + first + t, mask=member, other=0)
        log_w = tl.load(log_w_ptr + first + t, mask=member, other=float("-inf"))
        lv = tl.load(lv_ptr + row, mask=member, other=float("-inf"))
        new_w, new_lv = tl.maximum(top_w, tl.max(log_w, 0)), tl.maximum(top_lv, tl.max(lv, 0))
        shift_w = tl.where(new_w == float("-inf"), 0.0, new_w)
        shift_lv = tl.where(new_lv == float("-inf"), 0.0, new_lv)
        weight, decay = tl.exp(log_w - shift_w), tl.exp(top_w - shift_w)
        total_w = total_w * decay + tl.sum(weight, 0)
        total_lv = total_lv * tl.exp(top_lv - shift_lv) + tl.sum(tl.exp(lv - shift_lv), 0)
        mask = member[:, None] & (d < DIM)[None, :]
        keys = tl.load(k_ptr + row[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        k = k * decay + tl.sum(keys * weight[:, None], 0)
        mask = member[:, None] & (d < DIM_V)[None, :]
        values = tl.load(v_ptr + row[:, None] * DIM_V + d[None, :], mask=mask, other=0.0)
        v = v * decay + tl.sum(values * weight[:, None], 0)
        top_w, top_lv = new_w, new_lv
    # members that all weigh nothing: 0 / 0 = NaN as in torch, which the caller's guard refuses; no members: 0
    total_w = tl.where(count == 0, 1.0, total_w)
    tl.store(out_k_ptr + cluster * DIM + d, k / total_w, mask=d < DIM)
    tl.store(out_v_ptr + cluster * DIM_V + d, v / total_w, mask=d < DIM_V)
    tl.store(out_lv_ptr + cluster + tl.arange(0, 1), tl.log(total_lv) + top_lv)


@triton.jit(do_not_specialize=["n"])
def gather_kernel(
    pool_ptr, slots_ptr, out_ptr, n, stride_slot, stride_head,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Program (tile of slots, head): copies the head's numbers of each slot."""
    i, w = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + i, mask=i < n, other=0).to(tl.int64)
    mask = (i < n)[:, None] & (w < WIDTH)[None, :]
    x = tl.load(pool_ptr + head * stride_head + slot[:, None] * stride_slot + w[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + (head * n + i.to(tl.int64))[:, None] * WIDTH + w[None, :], x, mask=mask)


def nearest_kept(
    k: torch.Tensor, dropped: torch.Tensor, kept: torch.Tensor, allowed: torch.Tensor, within: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch_impl.nearest_kept; k [H, n, D] float32, bfloat16 or float16, contiguous vectors (else ValueError). No
    similarities are stored."""
    if k.dtype not in _KEYS or k.stride(2) != 1:
        raise ValueError(f"keys must be float32 or 16-bit floats with contiguous head_dim, got {k.dtype}")
    heads, n, dim = k.shape
    r, u = dropped.shape[1], kept.shape[1]
    best = torch.full((heads, r), -torch.inf, device=k.device)
    column = torch.zeros_like(dropped, memory_format=torch.contiguous_format)
    if u == 0 or r == 0:
        return best, column
    kept, within = kept.contiguous(), within if 0 < within < n else n
    blocks = triton.cdiv(n, within)
    if blocks == 1:
        ends = torch.arange(2, device=k.device, dtype=torch.int32).mul_(u).expand(heads, -1).contiguous()
    else:
        at = torch.arange(0, n + within, within, device=k.device).expand(heads, -1).contiguous()
        ends = torch.searchsorted(kept, at, out_int32=True)
    exact = k.dtype == torch.float32
    block = 32 if exact else 64
    nearest_kernel[(triton.cdiv(r, block), heads)](
        k, dropped.contiguous(), kept, allowed.contiguous().view(torch.uint8), ends, best, column, r, u, blocks, within,
        k.stride(0), k.stride(1), DIM=dim, BLOCK_R=block, BLOCK_U=block, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        UPCAST=exact or _interpreted(), num_warps=8 if exact else 4, num_stages=1 if exact else 2,
    )  # fmt: skip
    return best, column


def _interpreted() -> bool:
    return not isinstance(nearest_kernel, triton.runtime.JITFunction)


def supports(k: torch.Tensor) -> bool:
    """Keys that nearest_kept reads."""
    return k.dtype in _KEYS and k.stride(2) == 1


def merges(x: torch.Tensor) -> bool:
    """Keys or values that merge_segments reads."""
    return x.dtype == torch.float32 and x.is_contiguous()


def merge_segments(
    k: torch.Tensor, v: torch.Tensor, lv: torch.Tensor, log_w: torch.Tensor, seg: Segments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch_impl.merge_segments; float32 and contiguous (else ValueError)."""
    for x in (k, v, lv, log_w):
        if not merges(x):
            raise ValueError(f"merge_segments needs contiguous float32 tensors, got {x.dtype} {tuple(x.shape)}")
    clusters, dim, dim_v = seg.heads * seg.m, k.shape[2], v.shape[2]
    out_k, out_v = k.new_empty(seg.heads, seg.m, dim), v.new_empty(seg.heads, seg.m, dim_v)
    out_lv = lv.new_empty(seg.heads, seg.m)
    if clusters:
        merge_kernel[(clusters,)](
            k, v, lv, log_w, seg.rows, seg.offsets, seg.counts, out_k, out_v, out_lv,
            DIM=dim, DIM_V=dim_v, BLOCK_T=8, BLOCK_D=triton.next_power_of_2(max(dim, dim_v)), num_warps=2, num_stages=1,
        )  # fmt: skip
    return out_k, out_v, out_lv


def gathers(pool: torch.Tensor) -> bool:
    """Pools that gather_slots reads: a slot's [head, dim] numbers lie in a row."""
    return pool.stride(1) == math.prod(pool.shape[2:]) and pool.stride()[-1] == 1


def gather_slots(pool: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """As torch_impl.gather_slots, in one pass. ValueError for a pool that it does not read, or another `out`."""
    n, heads, width = len(slots), pool.shape[1], math.prod(pool.shape[2:])
    if not gathers(pool):
        raise ValueError(f"a pool needs contiguous [head, dim] rows, got {tuple(pool.shape)}, strides {pool.stride()}")
    if out.shape != (heads, n, *pool.shape[2:]) or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)}, strides {out.stride()}: expected [heads, slots, ...], contiguous")
    if n:
        block_w = triton.next_power_of_2(width)
        block_n = max(16, min(512, 2048 // block_w))
        gather_kernel[(triton.cdiv(n, block_n), heads)](
            pool, slots.contiguous(), out, n, pool.stride(0), pool.stride(1),
            WIDTH=width, BLOCK_N=block_n, BLOCK_W=block_w, num_warps=4, num_stages=1,
        )  # fmt: skip
