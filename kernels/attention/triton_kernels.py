"""The Triton kernels of triton_impl.py: vote-weighted decode, its merge of splits, and extend. Eq. 6, online softmax.

All take their tiles and dtypes as constexprs. UPCAST multiplies in float32: needed where the storage is float32, and in
Triton's interpreter, whose bfloat16 dot, + and * are silently wrong (Triton issue 11584). A log vote <= MASKED is
-inf here, and every maximum is guarded against it: nothing is ever -inf - -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e29)


@triton.jit
def _biased(logits, votes_ptr, slot, stride_votes, kv_head, known, HAS_VOTES: tl.constexpr):
    """logits [M, N] plus the log votes of N slots; -inf where masked or not `known` ([N] bool)."""
    if HAS_VOTES:
        vote = tl.load(votes_ptr + slot * stride_votes + kv_head, mask=known, other=0.0)
        known = known & (vote > MASKED)
        logits += vote[None, :]
    return tl.where(known[None, :], logits, float("-inf"))


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a @ b in float32; the operands as stored, or converted first."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b.to(a.dtype))


@triton.jit
def _online_softmax(logits, top, total, acc, v, UPCAST: tl.constexpr):
    """One block of keys: new (top [M], total [M], acc [M, D]). A row that has seen nothing keeps top = -inf."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(logits - shift[:, None])
    decay = tl.exp(top - shift)
    total = total * decay + tl.sum(weights, 1)
    if UPCAST:
        summed = _dot(weights, v, UPCAST)
    else:
        summed = _dot(weights.to(v.dtype), v, UPCAST)
    return new_top, total, acc * decay[:, None] + summed


@triton.jit
def decode_split(
    q_ptr, k_ptr, v_ptr, votes_ptr, table_ptr, rows_ptr, lens_ptr, part_ptr, lse_ptr,
    scale, stride_qb, stride_qh, stride_ks, stride_vs, stride_votes, stride_table,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    HAS_VOTES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (request, kv head x head tile, split): attention of one query over one part of its keys.

    Writes part [B, Hq, SPLITS, DIM] (only where the part has a visible key) and lse [B, Hq, SPLITS], natural log,
    -inf for a part without one.
    """
    request, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    tiles = tl.cdiv(GROUP, BLOCK_H)
    kv_head, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    in_group = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_D)
    mask_h, mask_d = in_group < GROUP, d < DIM
    row, length = tl.load(rows_ptr + request).to(tl.int64), tl.load(lens_ptr + request).to(tl.int32)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    q = tl.load(
        q_ptr + request * stride_qb + head[:, None] * stride_qh + d[None, :],
        mask=mask_h[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        known = index < last
        slot = tl.load(table_ptr + row * stride_table + index, mask=known, other=0).to(tl.int64)
        at = kv_head * DIM + d
        k = tl.load(k_ptr + slot[None, :] * stride_ks + at[:, None], mask=known[None, :] & mask_d[:, None], other=0.0)
        logits = _biased(_dot(q, k, UPCAST) * scale, votes_ptr, slot, stride_votes, kv_head, known, HAS_VOTES)
        v = tl.load(v_ptr + slot[:, None] * stride_vs + at[None, :], mask=known[:, None] & mask_d[None, :], other=0.0)
        top, total, acc = _online_softmax(logits, top, total, acc, v, UPCAST)
    some = total > 0
    out = (request * HEADS_KV * GROUP + head) * SPLITS + split
    tl.store(
        part_ptr + out[:, None] * DIM + d[None, :], acc / tl.where(some, total, 1.0)[:, None],
        mask=(mask_h & some)[:, None] & mask_d[None, :],
    )  # fmt: skip
    lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + out, lse, mask=mask_h)


@triton.jit
def decode_merge(
    part_ptr, lse_ptr, out_ptr, stride_ob, stride_oh,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (request, q head): out = sum_s exp(lse_s) part_s / sum_s exp(lse_s), in order of the parts; zeros when
    no part has a visible key. Reads only the parts that decode_split wrote."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base = (request * HEADS + head) * SPLITS
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + base + split)
    some = lse > float("-inf")
    top = tl.max(lse, 0)
    weights = tl.where(some, tl.exp(lse - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    part = tl.load(
        part_ptr + (base + split)[:, None] * DIM + d[None, :], mask=some[:, None] & (d < DIM)[None, :], other=0.0
    )
    total = tl.sum(weights, 0)
    out = tl.sum(part * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + request * stride_ob + head * stride_oh + d, out.to(out_ptr.dtype.element_ty), mask=d < DIM)


@triton.jit
def extend_tile(
    q_ptr, k_ptr, v_ptr, votes_ptr, table_ptr, rows_ptr, lens_ptr, new_ptr, out_ptr,
    batch, scale, stride_qb, stride_qh, stride_ob, stride_oh, stride_ks, stride_vs, stride_votes, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_VOTES: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head): BLOCK_M rows of one request, a row being (query, q head of the group).

    The queries of a group share keys, so they fill one tile. Tiles are counted request by request; the grid has as many
    as any division of the queries over requests can need, since the lengths are on the device.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    request, start_q, new, found = 0, 0, 0, 0
    while (found == 0) & (request < batch):
        new = tl.load(new_ptr + request).to(tl.int32)
        tiles = tl.cdiv(new * GROUP, BLOCK_M)
        if tile < tiles:
            found = 1
        else:
            tile -= tiles
            start_q += new
            request += 1
    if found == 0:
        return
    row, length = tl.load(rows_ptr + request).to(tl.int64), tl.load(lens_ptr + request).to(tl.int32)
    line, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m, mask_d = line < new * GROUP, d < DIM
    query = line // GROUP
    token, head = (start_q + query).to(tl.int64), kv_head * GROUP + line % GROUP
    q = tl.load(
        q_ptr + token[:, None] * stride_qb + head[:, None] * stride_qh + d[None, :],
        mask=mask_m[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    visible = length - new + query  # last key that the row sees
    end = length
    if CAUSAL:
        end = tl.minimum(length, length - new + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, end, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        known = index < length
        slot = tl.load(table_ptr + row * stride_table + index, mask=known, other=0).to(tl.int64)
        at = kv_head * DIM + d
        k = tl.load(k_ptr + slot[None, :] * stride_ks + at[:, None], mask=known[None, :] & mask_d[:, None], other=0.0)
        logits = _biased(_dot(q, k, UPCAST) * scale, votes_ptr, slot, stride_votes, kv_head, known, HAS_VOTES)
        if CAUSAL:
            logits = tl.where(index[None, :] <= visible[:, None], logits, float("-inf"))
        v = tl.load(v_ptr + slot[:, None] * stride_vs + at[None, :], mask=known[:, None] & mask_d[None, :], other=0.0)
        top, total, acc = _online_softmax(logits, top, total, acc, v, UPCAST)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out_ptr + token[:, None] * stride_ob + head[:, None] * stride_oh + d[None, :],
        out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :],
    )  # fmt: skip
