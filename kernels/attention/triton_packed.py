"""Packed spans (packed.py) in Triton, on a GPU or in Triton's interpreter: beside SGLang's kernels, which attend to the
slots in no packed span, ours attend to the cells, and both are joined by log-sum-exp.

    cut: rows -> SGLang's kv_indptr and kv_indices without packed spans, and a list of these
    decode, extend: SGLang's output and its log-sum-exp -> the output over slots and cells
    gather_cells: what a compression reads of them

A request without packed spans, and a head without cells, keeps the bits of SGLang's kernels. Nothing here synchronises
with the device, and all that changes between two steps lies behind addresses that stay: a CUDA graph may hold decode.

Indices are not checked. Rounding as in triton_impl.py; an extend's output over the slots has been rounded to its
storage before it is joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from keepkv_sglang.kernels.host import on_device

from .contract import GPU_STORAGE_DTYPES, check_layout
from .packed import Layers, Packed
from .triton_impl import decode_splits, interpreted, upcast
from .triton_packed_kernels import cut_count, cut_write, gather_runs, packed_extend, packed_join, packed_split

_SLOTS_AT_ONCE = 1024  # of a row, in cut


@dataclass(frozen=True)
class CellTable:
    """Which slots of a pool are packed. span_of int32 [S]: the number of a slot's packed span, 0: none. starts int64
    [1]: the address of int64 [numbers, L H + 1], the run starts of each number (packed.py). Both on the device, at
    addresses that stay."""

    layers: Layers
    span_of: torch.Tensor
    starts: torch.Tensor


@dataclass(frozen=True)
class CutRows:
    """Rows whose packed spans cut() has found.

    table int32 [R, C], rows [B]: as given. indptr int32 [B + 1], indices int64: the slots of request b in no packed
    span are indices[indptr[b] : indptr[b + 1]]. first int32 [B + 1]: its packed spans are entries first[b] ..
    first[b + 1] - 1 of what lies in `indices` behind all slots, (place in the row) << 32 | number.
    """

    cells: CellTable
    table: torch.Tensor
    rows: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    first: torch.Tensor


def cut(
    cells: CellTable,
    table: torch.Tensor,
    rows: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    first: torch.Tensor,
    keep_last: bool,
) -> CutRows:
    """Finds the packed spans of rows [B] of `table` int32 [R, C], lens [B] slots each.

    Writes indptr and first int32 [B + 1], whose first elements must be 0, and indices int64 [at least sum(lens)], as
    CutRows has them. keep_last: a row's last slot is in no packed span, whatever cells says: a decode's new token, and
    what pads a graph's batch, where SGLang's kernels need a key.
    """
    batch = len(rows)
    if batch:
        shared = (table, rows, lens, cells.span_of, indptr, first)
        cut_count[(batch,)](*shared, table.stride(0), KEEP_LAST=keep_last, BLOCK=_SLOTS_AT_ONCE, num_warps=4)
        for counts in (indptr, first):
            counts[1 : batch + 1].cumsum_(0)
        cut_write[(batch,)](
            *shared, indices, batch, table.stride(0), KEEP_LAST=keep_last, BLOCK=_SLOTS_AT_ONCE, num_warps=4
        )
    return CutRows(cells, table, rows, indptr, indices, first)


def decode(
    q: torch.Tensor,
    found: CutRows,
    layer: int,
    scale: float,
    raw_part: torch.Tensor,
    raw_lse: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """q [B, Hq, D], one query per request. raw_part float32 [>= B, Hq, R, D], raw_lse float32 [>= B, Hq, R]: attention
    over the slots in R parts and its log-sum-exp, natural, -inf for a part without a slot; both contiguous. out
    [B, Hq, D]: the same joined, on entry; slots and cells joined, on return.

    Allocates float32 scratch [B, Hq, splits, D] and [B, Hq, splits]. ValueError for shapes and dtypes outside this.
    """
    layers = found.cells.layers
    keys = _check(q, found, layer, out)
    batch, heads, dim = q.shape
    if raw_part.shape[1:] != (heads, raw_lse.shape[2], dim) or not (
        raw_part.is_contiguous() and raw_lse.is_contiguous()
    ):
        raise ValueError(f"parts {tuple(raw_part.shape)} and {tuple(raw_lse.shape)} of {heads} heads do not fit")
    if batch == 0:
        return
    heads_kv = keys.shape[1]
    group, up = heads // heads_kv, upcast(q, keys)
    block_h = min(16 if up else 64, max(16, triton.next_power_of_2(group)))
    tiles = heads_kv * triton.cdiv(group, block_h)
    splits = decode_splits(batch * tiles)
    part = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(dim)
    packed_split[(batch, tiles, splits)](
        q, *_pools(found), found.table, found.rows, found.indptr, found.first, found.indices, part, lse,
        scale, layer, batch, q.stride(0), q.stride(1), *_strides(found),
        HEADS=heads_kv, LAYERS=len(layers.keys), GROUP=group, DIM=dim,
        BLOCK_H=block_h, BLOCK_N=32, BLOCK_D=block_d, BLOCK_S=16 if block_d <= 64 else 32, SPLITS=splits,
        UPCAST=up, num_warps=4, num_stages=2,
    )  # fmt: skip
    raw_splits = raw_lse.shape[2]
    result = _result(out)
    packed_join[(batch, heads)](
        part, lse, raw_part, raw_lse, found.first, result, result.stride(0), result.stride(1),
        Q_HEADS=heads, DIM=dim, BLOCK_D=block_d, SPLITS=splits, RAW_SPLITS=raw_splits,
        BLOCK_R=triton.next_power_of_2(raw_splits), num_warps=4, num_stages=1,
    )  # fmt: skip
    if result is not out:
        out.copy_(result)


def extend(
    q: torch.Tensor,
    found: CutRows,
    layer: int,
    scale: float,
    queries: torch.Tensor,
    raw_lse: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """q [T, Hq, D]; `queries` integers [B + 1]: those of request b are queries[b] .. queries[b + 1] - 1, and each sees
    all cells of its head. raw_lse float32 [T, Hq], contiguous: log-sum-exp, natural, of attention over the slots, which
    is `out` [T, Hq, D] on entry; slots and cells joined, on return. ValueError as for decode."""
    layers = found.cells.layers
    keys = _check(q, found, layer, out)
    tokens, heads, dim = q.shape
    if raw_lse.shape != (tokens, heads) or not raw_lse.is_contiguous():
        raise ValueError(f"log-sum-exp {tuple(raw_lse.shape)} of {tokens} queries and {heads} heads does not fit")
    batch = len(found.rows)
    if tokens == 0 or batch == 0:
        return
    heads_kv = keys.shape[1]
    group, up = heads // heads_kv, upcast(q, keys)
    block_d = triton.next_power_of_2(dim)
    # other tiles spill (make compile-gate): a cell's place takes registers that a slot's does not
    block_m, block_n = (32, 16) if up and not interpreted() else (64, 32)
    result = _result(out)
    packed_extend[(triton.cdiv(tokens * group, block_m) + batch, heads_kv)](
        q, *_pools(found), found.table, found.rows, found.indptr, found.first, found.indices, queries, raw_lse, result,
        scale, layer, batch, q.stride(0), q.stride(1), result.stride(0), result.stride(1), raw_lse.stride(0),
        *_strides(found),
        HEADS=heads_kv, LAYERS=len(layers.keys), GROUP=group, DIM=dim,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_S=16, UPCAST=up,
        num_warps=4, num_stages=2 if block_d <= 128 else 1,
    )  # fmt: skip
    if result is not out:
        out.copy_(result)


def gather_cells(packed: Packed, layers: Sequence[int], room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cpp_impl.gather_cells on the device. Waits for nothing."""
    pool, votes = packed.layers.keys[0], packed.layers.log_votes[0]
    _, heads, dim = pool.shape
    spans = packed.first.tolist()[1]
    entries = (packed.at[:spans] << 32) | torch.arange(spans)
    runs = torch.tensor([layer * heads + head for layer in layers for head in range(heads)])
    entries, runs, start = (on_device(x, pool.device) for x in (entries, runs, packed.start))
    keys_out, votes_out = pool.new_empty(len(runs), room, dim), votes.new_empty(len(runs), room)
    if room:
        gather_runs[(len(runs), triton.cdiv(room, 32))](
            pool, votes, packed.layers.offsets, start, packed.slots, entries, runs, keys_out, votes_out, spans, room,
            pool.stride(0), votes.stride(0),
            HEADS=heads, LAYERS=len(packed.layers.keys), DIM=dim,
            BLOCK_N=32, BLOCK_D=triton.next_power_of_2(dim), BLOCK_S=16, num_warps=4,
        )  # fmt: skip
    return keys_out, votes_out


def _check(q: torch.Tensor, found: CutRows, layer: int, out: torch.Tensor) -> torch.Tensor:
    """The layer's keys. ValueError for what does not fit them."""
    layers = found.cells.layers
    keys = layers.keys[layer]
    check_layout(q, keys, layers.values[layer], layers.log_votes[layer], found.table, out, GPU_STORAGE_DTYPES)
    if q.stride(2) != 1:
        raise ValueError("q needs contiguous rows")
    return keys


def _pools(found: CutRows) -> tuple[torch.Tensor, ...]:
    layers = found.cells.layers
    return layers.keys[0], layers.values[0], layers.log_votes[0], layers.offsets, found.cells.starts


def _strides(found: CutRows) -> tuple[int, ...]:
    layers = found.cells.layers
    return layers.keys[0].stride(0), layers.values[0].stride(0), layers.log_votes[0].stride(0), found.table.stride(0)


def _result(out: torch.Tensor) -> torch.Tensor:
    """What a kernel reads and writes: `out`, or float32 where the interpreter would cut bfloat16 off instead of
    rounding it."""
    return out.float() if interpreted() and out.dtype == torch.bfloat16 else out
