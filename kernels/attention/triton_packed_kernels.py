"""The Triton kernels of triton_packed.py: what a row has in packed spans (packed.py), for a decode and an extend.

A program works on one request and one kv head, whose cells it numbers over all of the request's spans: entry i of the
head. Spans are read BLOCK_S at a time, and which of them has an entry is found by comparing it with where each begins
and ends, so that short spans fill blocks of keys together. Tiles, UPCAST and masks as in triton_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import MASKED, _dot, _online_softmax


@triton.jit
def _row(table_ptr, row, span_of_ptr, index, last, length):
    """(slot, span, span of the slot before) of entries `index` of a row of `length` slots; spans 0: none, as always
    at `last`."""
    known = index < length
    slot = tl.load(table_ptr + row + index, mask=known, other=0)
    span = tl.load(span_of_ptr + slot, mask=known & (index != last), other=0)
    ahead = known & (index > 0)
    before = tl.load(table_ptr + row + index - 1, mask=ahead, other=0)
    return slot, span, tl.load(span_of_ptr + before, mask=ahead, other=0)


@triton.jit
def cut_count(
    table_ptr, rows_ptr, lens_ptr, span_of_ptr, indptr_ptr, first_ptr, stride_table,
    KEEP_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (request b): indptr[b + 1] = slots in no packed span, first[b + 1] = packed spans."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request).to(tl.int64) * stride_table
    length = tl.load(lens_ptr + request).to(tl.int32)
    last = length - 1 if KEEP_LAST else -1
    raw, spans = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        _slot, span, before = _row(table_ptr, row, span_of_ptr, index, last, length)
        raw += ((index < length) & (span == 0)).to(tl.int32)
        spans += ((span != 0) & (span != before)).to(tl.int32)
    tl.store(indptr_ptr + request + 1, tl.sum(raw, 0))
    tl.store(first_ptr + request + 1, tl.sum(spans, 0))


@triton.jit
def cut_write(
    table_ptr, rows_ptr, lens_ptr, span_of_ptr, indptr_ptr, first_ptr, indices_ptr, batch, stride_table,
    KEEP_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (request b): its slots in no packed span to indices[indptr[b]:], in order; behind those of all requests
    one entry per packed span, its place in the row << 32 | its number."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request).to(tl.int64) * stride_table
    length = tl.load(lens_ptr + request).to(tl.int32)
    last = length - 1 if KEEP_LAST else -1
    raw_at = tl.load(indptr_ptr + request)
    span_at = tl.load(indptr_ptr + batch) + tl.load(first_ptr + request)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        slot, span, before = _row(table_ptr, row, span_of_ptr, index, last, length)
        raw = (index < length) & (span == 0)
        opens = (span != 0) & (span != before)
        one, other = raw.to(tl.int32), opens.to(tl.int32)
        tl.store(indices_ptr + raw_at + tl.cumsum(one, 0) - 1, slot.to(tl.int64), mask=raw)
        entry = (index.to(tl.int64) << 32) | span.to(tl.int64)
        tl.store(indices_ptr + span_at + tl.cumsum(other, 0) - 1, entry, mask=opens)
        raw_at += tl.sum(one, 0)
        span_at += tl.sum(other, 0)


@triton.jit
def _spans(spans_ptr, starts, s, last, run, RUNS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of spans s .. s + BLOCK_S - 1 below `last`: place in the row, slots, first cell and cells of a run."""
    at = s + tl.arange(0, BLOCK_S)
    known = at < last
    entry = tl.load(spans_ptr + at, mask=known, other=0)
    place, number = (entry >> 32).to(tl.int32), entry & 0xFFFFFFFF
    line = starts + number * (RUNS + 1)
    start = tl.load(line + run, mask=known, other=0).to(tl.int32)
    count = tl.load(line + run + 1, mask=known, other=0).to(tl.int32) - start
    slots = tl.load(line + RUNS, mask=known, other=RUNS).to(tl.int32) // RUNS
    return place, slots, start, count


@triton.jit
def _keys(i, end, begins, place, slots, start, count, row_ptr, HEADS: tl.constexpr, LAYERS: tl.constexpr):
    """(slot, layer, head, known) of entries i [N] below `end`, all of them in these spans [BLOCK_S]."""
    inside = (begins[None, :] <= i[:, None]) & (i[:, None] < (begins + count)[None, :])
    f = i + tl.sum(tl.where(inside, (start - begins)[None, :], 0), 1)
    per_layer = tl.maximum(tl.sum(tl.where(inside, slots[None, :], 0), 1), 1) * HEADS
    first = tl.sum(tl.where(inside, place[None, :], 0), 1)
    layer = f // per_layer
    rest = f - layer * per_layer
    known = (i < end) & (layer < LAYERS)
    slot = tl.load(row_ptr + first + rest // HEADS, mask=known, other=0).to(tl.int64)
    return slot, tl.where(known, layer, 0), rest % HEADS, known


@triton.jit
def _attend(
    q, k_ptr, v_ptr, votes_ptr, offsets_ptr, scale, slot, layer, head, known, top, total, acc,
    stride_ks, stride_vs, stride_votes,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, LAYERS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over one block of cells. offsets [3, LAYERS]: where a layer's keys, values and votes begin, in
    elements from layer 0's."""
    d = tl.arange(0, BLOCK_D)
    mask_d = d < DIM
    # Layers begin at multiples of 8 elements (Layers.offsets): a head's key is read 16 bytes at a time.
    of_k = tl.multiple_of(tl.load(offsets_ptr + layer), [8])
    of_v = tl.multiple_of(tl.load(offsets_ptr + LAYERS + layer), [8])
    of_votes = tl.load(offsets_ptr + 2 * LAYERS + layer)
    at_k = of_k + slot * stride_ks + head * DIM
    k = tl.load(k_ptr + at_k[None, :] + d[:, None], mask=known[None, :] & mask_d[:, None], other=0.0)
    vote = tl.load(votes_ptr + of_votes + slot * stride_votes + head, mask=known, other=0.0)
    known = known & (vote > MASKED)
    logits = tl.where(known[None, :], _dot(q, k, UPCAST) * scale + vote[None, :], float("-inf"))
    at_v = of_v + slot * stride_vs + head * DIM
    v = tl.load(v_ptr + at_v[:, None] + d[None, :], mask=known[:, None] & mask_d[None, :], other=0.0)
    return _online_softmax(logits, top, total, acc, v, UPCAST)


@triton.jit(do_not_specialize=["layer", "batch"])
def packed_split(
    q_ptr, k_ptr, v_ptr, votes_ptr, offsets_ptr, starts_ptr, table_ptr, rows_ptr, indptr_ptr, first_ptr, indices_ptr,
    part_ptr, lse_ptr, scale, layer, batch,
    stride_qb, stride_qh, stride_ks, stride_vs, stride_votes, stride_table,
    HEADS: tl.constexpr, LAYERS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (request, kv head x head tile, split): attention of one query over one part of its head's cells.

    Writes part [B, Hq, SPLITS, DIM] (only where the part has a visible cell) and lse [B, Hq, SPLITS], natural log,
    -inf for a part without one; nothing for a request without packed spans.
    """
    request, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    tiles = tl.cdiv(GROUP, BLOCK_H)
    kv_head, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    first, last = tl.load(first_ptr + request), tl.load(first_ptr + request + 1)
    if first == last:
        return
    spans_ptr = indices_ptr + tl.load(indptr_ptr + batch)
    starts = tl.load(starts_ptr).to(tl.pointer_type(tl.int64))
    run = layer * HEADS + kv_head
    RUNS: tl.constexpr = LAYERS * HEADS
    cells = 0
    for s in range(first, last, BLOCK_S):
        _place, _slots, _start, count = _spans(spans_ptr, starts, s, last, run, RUNS, BLOCK_S)
        cells += tl.sum(count, 0)
    per_split = tl.cdiv(tl.cdiv(cells, SPLITS), BLOCK_N) * BLOCK_N
    low = split * per_split
    high = tl.minimum(low + per_split, cells)
    in_group = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    q_head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_D)
    mask_h, mask_d = in_group < GROUP, d < DIM
    q = tl.load(
        q_ptr + request * stride_qb + q_head[:, None] * stride_qh + d[None, :],
        mask=mask_h[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    row_ptr = table_ptr + tl.load(rows_ptr + request).to(tl.int64) * stride_table
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    base = 0
    for s in range(first, last, BLOCK_S):
        place, slots, start, count = _spans(spans_ptr, starts, s, last, run, RUNS, BLOCK_S)
        begins = base + tl.cumsum(count, 0) - count
        base += tl.sum(count, 0)
        end = tl.minimum(high, base)
        for at in range(tl.maximum(low, base - tl.sum(count, 0)), end, BLOCK_N):
            i = at + tl.arange(0, BLOCK_N)
            slot, where, head, known = _keys(i, end, begins, place, slots, start, count, row_ptr, HEADS, LAYERS)
            top, total, acc = _attend(
                q, k_ptr, v_ptr, votes_ptr, offsets_ptr, scale, slot, where, head, known, top, total, acc,
                stride_ks, stride_vs, stride_votes, DIM, BLOCK_D, LAYERS, UPCAST,
            )  # fmt: skip
    some = total > 0
    out = (request * HEADS * GROUP + q_head) * SPLITS + split
    tl.store(
        part_ptr + out[:, None] * DIM + d[None, :], acc / tl.where(some, total, 1.0)[:, None],
        mask=(mask_h & some)[:, None] & mask_d[None, :],
    )  # fmt: skip
    lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + out, lse, mask=mask_h)


@triton.jit
def packed_join(
    part_ptr, lse_ptr, raw_part_ptr, raw_lse_ptr, first_ptr, out_ptr, stride_ob, stride_oh,
    Q_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, RAW_SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (request, q head): out = sum_s exp(lse_s) part_s / sum_s exp(lse_s) over the parts of the raw slots,
    [B, Hq, RAW_SPLITS, DIM] with lse -inf where there is none, and those of packed_split. Writes nothing, and so keeps
    the raw slots' bits, where the head has no visible cell."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(first_ptr + request) == tl.load(first_ptr + request + 1):
        return
    d, split, raw = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS), tl.arange(0, BLOCK_R)
    mask_d = (d < DIM)[None, :]
    base, raw_base = (request * Q_HEADS + head) * SPLITS, (request * Q_HEADS + head) * RAW_SPLITS
    lse = tl.load(lse_ptr + base + split)
    best = tl.max(lse, 0)
    if best == float("-inf"):
        return
    raw_lse = tl.load(raw_lse_ptr + raw_base + raw, mask=raw < RAW_SPLITS, other=float("-inf"))
    best = tl.maximum(best, tl.max(raw_lse, 0))
    some, raw_some = lse > float("-inf"), raw_lse > float("-inf")
    weight = tl.where(some, tl.exp(lse - best), 0.0)
    raw_weight = tl.where(raw_some, tl.exp(raw_lse - best), 0.0)
    part = tl.load(part_ptr + (base + split)[:, None] * DIM + d[None, :], mask=some[:, None] & mask_d, other=0.0)
    raw_part = tl.load(
        raw_part_ptr + (raw_base + raw)[:, None] * DIM + d[None, :], mask=raw_some[:, None] & mask_d, other=0.0
    )
    total = tl.sum(weight, 0) + tl.sum(raw_weight, 0)
    out = (tl.sum(part * weight[:, None], 0) + tl.sum(raw_part * raw_weight[:, None], 0)) / total
    tl.store(out_ptr + request * stride_ob + head * stride_oh + d, out.to(out_ptr.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["layer", "batch"])
def packed_extend(
    q_ptr, k_ptr, v_ptr, votes_ptr, offsets_ptr, starts_ptr, table_ptr, rows_ptr, indptr_ptr, first_ptr, indices_ptr,
    queries_ptr, raw_lse_ptr, out_ptr, scale, layer, batch,
    stride_qb, stride_qh, stride_ob, stride_oh, stride_lse, stride_ks, stride_vs, stride_votes, stride_table,
    HEADS: tl.constexpr, LAYERS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head): BLOCK_M rows of one request, a row being (query, q head of the group); tiles as in
    extend_tile. queries [B + 1]: the queries of each request.

    Joins `out`, attention over the raw slots with log-sum-exp raw_lse [T, Hq] (natural), with that over the head's
    cells, in place. Writes nothing where the head has no visible cell.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    request, start_q, new, found = 0, 0, 0, 0
    while (found == 0) & (request < batch):
        start_q = tl.load(queries_ptr + request).to(tl.int32)
        new = tl.load(queries_ptr + request + 1).to(tl.int32) - start_q
        tiles = tl.cdiv(new * GROUP, BLOCK_M)
        if tile < tiles:
            found = 1
        else:
            tile -= tiles
            request += 1
    if found == 0:
        return
    first, last = tl.load(first_ptr + request), tl.load(first_ptr + request + 1)
    if first == last:
        return
    spans_ptr = indices_ptr + tl.load(indptr_ptr + batch)
    starts = tl.load(starts_ptr).to(tl.pointer_type(tl.int64))
    run = layer * HEADS + kv_head
    RUNS: tl.constexpr = LAYERS * HEADS
    line, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m, mask_d = line < new * GROUP, d < DIM
    token, q_head = (start_q + line // GROUP).to(tl.int64), kv_head * GROUP + line % GROUP
    q = tl.load(
        q_ptr + token[:, None] * stride_qb + q_head[:, None] * stride_qh + d[None, :],
        mask=mask_m[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    row_ptr = table_ptr + tl.load(rows_ptr + request).to(tl.int64) * stride_table
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for s in range(first, last, BLOCK_S):
        place, slots, start, count = _spans(spans_ptr, starts, s, last, run, RUNS, BLOCK_S)
        begins = tl.cumsum(count, 0) - count
        cells = tl.sum(count, 0)
        for at in range(0, cells, BLOCK_N):
            i = at + tl.arange(0, BLOCK_N)
            slot, where, head, known = _keys(i, cells, begins, place, slots, start, count, row_ptr, HEADS, LAYERS)
            top, total, acc = _attend(
                q, k_ptr, v_ptr, votes_ptr, offsets_ptr, scale, slot, where, head, known, top, total, acc,
                stride_ks, stride_vs, stride_votes, DIM, BLOCK_D, LAYERS, UPCAST,
            )  # fmt: skip
    some = mask_m & (total > 0)
    raw_lse = tl.load(raw_lse_ptr + token * stride_lse + q_head, mask=some, other=float("-inf"))
    lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    best = tl.where(some, tl.maximum(lse, raw_lse), 0.0)
    raw_weight = tl.exp(raw_lse - best)
    weight = tl.exp(lse - best)
    where_out = token[:, None] * stride_ob + q_head[:, None] * stride_oh + d[None, :]
    mask = some[:, None] & mask_d[None, :]
    raw = tl.load(out_ptr + where_out, mask=mask, other=0.0).to(tl.float32)
    share = weight / tl.where(some, total * (weight + raw_weight), 1.0)
    out = acc * share[:, None] + raw * (raw_weight / tl.where(some, weight + raw_weight, 1.0))[:, None]
    tl.store(out_ptr + where_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_runs(
    k_ptr, votes_ptr, offsets_ptr, starts_ptr, slots_ptr, spans_ptr, runs_ptr, keys_ptr, out_votes_ptr, spans, room,
    stride_ks, stride_votes,
    HEADS: tl.constexpr, LAYERS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (run, block): entries of a run to keys [runs, room, DIM] and out_votes [runs, room], keys of 0 and votes
    of -inf behind its last."""
    line = tl.program_id(0)
    run = tl.load(runs_ptr + line)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    RUNS: tl.constexpr = LAYERS * HEADS
    of_k, of_votes = tl.zeros([BLOCK_N], tl.int64), tl.zeros([BLOCK_N], tl.int64)
    base = 0
    for s in range(0, spans, BLOCK_S):
        place, slots, start, count = _spans(spans_ptr, starts_ptr, s, spans, run, RUNS, BLOCK_S)
        begins = base + tl.cumsum(count, 0) - count
        end = base + tl.sum(count, 0)
        slot, layer, head, known = _keys(i, end, begins, place, slots, start, count, slots_ptr, HEADS, LAYERS)
        known = known & (i >= base)
        at_k = tl.load(offsets_ptr + layer) + slot * stride_ks + head * DIM
        at_votes = tl.load(offsets_ptr + 2 * LAYERS + layer) + slot * stride_votes + head
        of_k, of_votes = tl.where(known, at_k, of_k), tl.where(known, at_votes, of_votes)
        base = end
    known = i < base
    k = tl.load(k_ptr + of_k[:, None] + d[None, :], mask=known[:, None] & (d < DIM)[None, :], other=0.0)
    vote = tl.load(votes_ptr + of_votes, mask=known, other=float("-inf"))
    out = line.to(tl.int64) * room + i
    tl.store(keys_ptr + out[:, None] * DIM + d[None, :], k, mask=(i < room)[:, None] & (d < DIM)[None, :])
    tl.store(out_votes_ptr + out, vote, mask=i < room)
