"""Vote-weighted attention in C++ (cpu_attention.cpp) through ctypes. See the package's docstring for the
contract.

Deterministic: a request's output bits depend on its own tensors only, not on batch neighbours, slot placement
or the number of threads (torch.get_num_threads() are used).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from keepkv_sglang.kernels import cpu_build

from .contract import Lengths, as_int64, check
from .packed import Cut, Packed

name = "cpp"

_POINTERS = ("q", "k", "v", "votes", "table", "rows", "seq_lens", "extend_lens", "out")
_SIZES = (
    *("q_stride", "k_stride", "v_stride", "votes_stride", "table_stride", "out_stride"),
    *("slots", "table_rows", "table_columns", "batch", "heads_q", "heads_kv", "dim", "causal", "threads"),
)
_PACKED = ("k", "v", "votes", "first", "at", "slots", "start")
_CUT = ("table", "span_of", "rows", "lens", "raw", "slots", "raw_lens", "first", "at", "spans")
_CUT_SIZES = ("table_stride", "raw_stride", "table_rows", "table_columns", "pool", "batch")
_GATHER = ("packed", "layers", "keys", "votes")
_GATHER_SIZES = ("count", "heads", "dim", "room", "k_stride", "votes_stride")
_ERRORS = {
    1: "attention: rows, seq_lens or extend_lens point outside req_to_token",
    2: "attention: a slot is outside the pool",
    4: "attention: a packed span's runs or slots do not fit it",
}


class _Args(ctypes.Structure):
    _fields_ = [
        *((field, ctypes.c_void_p) for field in _POINTERS),
        *((field, ctypes.c_int64) for field in _SIZES),
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_double),
    ]


class _Packed(ctypes.Structure):
    _fields_ = [(x, ctypes.c_void_p) for x in _PACKED] + [(x, ctypes.c_int64) for x in ("layers", "layer")]

    @classmethod
    def of(cls, p: Packed) -> _Packed:
        tensors = (*p.layers.pointers, p.first, p.at, p.slots, p.start)
        return cls(*(x.data_ptr() for x in tensors), len(p.layers.keys), p.layer)


class _Cut(ctypes.Structure):
    _fields_ = [(x, ctypes.c_void_p) for x in _CUT] + [(x, ctypes.c_int64) for x in _CUT_SIZES]


class _Gather(ctypes.Structure):
    _fields_ = [(x, ctypes.c_void_p) for x in _GATHER] + [(x, ctypes.c_int64) for x in _GATHER_SIZES]


_library = cpu_build.build("attention")  # at import: load() turns a failure into a fallback
_function = cpu_build.load(_library, "keepkv_attention")
_function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]  # type: ignore[attr-defined]
_cut = cpu_build.load(_library, "keepkv_cut")
_cut.argtypes = [ctypes.c_void_p]  # type: ignore[attr-defined]
_gather = cpu_build.load(_library, "keepkv_gather_cells")
_gather.argtypes = [ctypes.c_void_p, ctypes.c_int]  # type: ignore[attr-defined]


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    votes: torch.Tensor | None,
    table: torch.Tensor,
    rows: Lengths,
    lens: Lengths,
    new: Lengths | None,
    scale: float,
    out: torch.Tensor,
    causal: bool,
    packed: Packed | None,
) -> None:
    cells = _Packed.of(packed) if packed is not None else None
    q = check(q, k, v, votes, table, out)
    rows = as_int64(rows, "rows", len(rows))
    batch = rows.numel()
    lens = as_int64(lens, "seq_lens", batch)
    news = None if new is None else as_int64(new, "extend_lens", batch)
    queries = batch if news is None else int(news.sum())
    if queries != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows, the lengths ask for {queries}")
    args = _Args(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        votes.data_ptr() if votes is not None else None,
        table.data_ptr(),
        rows.data_ptr(),
        lens.data_ptr(),
        news.data_ptr() if news is not None else None,
        out.data_ptr(),
        q.stride()[0],
        k.stride()[0],
        v.stride()[0],
        votes.stride()[0] if votes is not None else 0,
        table.stride()[0],
        out.stride()[0],
        k.shape[0],
        table.shape[0],
        table.shape[1],
        batch,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        causal,
        torch.get_num_threads(),
        ctypes.addressof(cells) if cells is not None else None,
        scale,
    )
    code = _function(ctypes.addressof(args), q.dtype == torch.bfloat16, k.dtype == torch.bfloat16)
    if code:
        cpu_build.raise_for(code)
        raise IndexError(_ERRORS[code])


def decode(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    log_votes: torch.Tensor | None,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    packed: Packed | None = None,
) -> None:
    _call(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, None, scale, out, False, packed)


def extend(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    log_votes: torch.Tensor | None,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    causal: bool = True,
    packed: Packed | None = None,
) -> None:
    _call(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, extend_lens, scale, out, causal, packed)


def cut(table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor, span_of: torch.Tensor) -> Cut:
    """Takes the packed spans out of rows int64 [B] of `table` int32 [R, C], lens int64 [B] slots each. span_of int32
    [S]: which packed span a slot belongs to, 0: none. IndexError for rows or slots outside table and pool."""
    batch, total, longest = len(rows), int(lens.sum()), int(lens.max()) if len(lens) else 0
    raw = torch.empty(batch, max(1, longest), dtype=torch.int32)
    slots = torch.empty(total, dtype=torch.int32)
    counts = [torch.empty(size, dtype=torch.int64) for size in (batch, batch + 1, total + 1, total)]
    given = (table, span_of, rows.contiguous(), lens.contiguous(), raw, slots, *counts)
    sizes = (table.stride(0), raw.stride(0), *table.shape, len(span_of), batch)
    args = _Cut(*(x.data_ptr() for x in given), *sizes)
    if code := _cut(ctypes.addressof(args)):
        raise IndexError(_ERRORS[code])
    raw_lens, first, at, spans = counts
    made = int(first[-1])
    return Cut(raw, torch.arange(batch), raw_lens, first, at[: made + 1], slots[: int(at[made])], spans[:made])


def gather_cells(packed: Packed, layers: Sequence[int], room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [layers * H, room, D] and log votes [layers * H, room] of what the heads of these layers have in the first
    request's packed spans, filled up with keys of zeros and votes of -inf. room: at least the longest run."""
    pool, votes = packed.layers.keys[0], packed.layers.log_votes[0]
    _, heads, dim = pool.shape
    keys_out = pool.new_empty(len(layers) * heads, room, dim)
    votes_out = votes.new_empty(len(layers) * heads, room)
    cells, numbers = _Packed.of(packed), torch.tensor(list(layers))
    pointers = (ctypes.addressof(cells), numbers.data_ptr(), keys_out.data_ptr(), votes_out.data_ptr())
    args = _Gather(*pointers, len(layers), heads, dim, room, pool.stride(0), votes.stride(0))
    cpu_build.raise_for(_gather(ctypes.addressof(args), pool.dtype == torch.bfloat16))
    return keys_out, votes_out
