"""Vote-weighted attention in C++ (cpu_attention.cpp) through ctypes. See the package's docstring for the
contract.

Deterministic: a request's output bits depend on its own tensors only, not on batch neighbours, slot placement
or the number of threads (torch.get_num_threads() are used).
"""

from __future__ import annotations

import ctypes

import torch

from keepkv_sglang.kernels import cpu_build

from .contract import Lengths, as_int64, check

name = "cpp"

_POINTERS = ("q", "k", "v", "votes", "table", "rows", "seq_lens", "extend_lens", "out")
_SIZES = (
    *("q_stride", "k_stride", "v_stride", "votes_stride", "table_stride", "out_stride"),
    *("slots", "table_rows", "table_columns", "batch", "heads_q", "heads_kv", "dim", "causal", "threads"),
)
_ERRORS = {
    1: "attention: rows, seq_lens or extend_lens point outside req_to_token",
    2: "attention: a slot is outside the pool",
}


class _Args(ctypes.Structure):
    _fields_ = (
        [(field, ctypes.c_void_p) for field in _POINTERS]
        + [(field, ctypes.c_int64) for field in _SIZES]
        + [("scale", ctypes.c_double)]
    )


_function = cpu_build.load(
    cpu_build.build("attention"), "keepkv_attention"
)  # at import: load() turns a failure into a fallback
_function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]  # type: ignore[attr-defined]


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
) -> None:
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
) -> None:
    _call(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, None, scale, out, False)


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
) -> None:
    _call(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, extend_lens, scale, out, causal)
