"""Matching, means over clusters and the fit of `attention_matching` in C++ (cpu_merge.cpp).

Deterministic: a head's bits do not depend on the other heads or on the number of threads (torch.get_num_threads()).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from keepkv_sglang.kernels import cpu_build

from .torch_impl import Segments

_NEAREST = ("k", "dropped", "kept", "allowed", "similarity", "column")
_NEAREST_SIZES = ("k_token", "k_head", "heads", "dim", "dropped_count", "kept_count", "within", "threads")
_SEGMENTS = ("k", "v", "lv", "log_w", "rows", "offsets", "counts", "out_k", "out_v", "out_lv")
_SEGMENTS_SIZES = ("clusters", "dim", "dim_v", "threads")
_FIT = (
    *("k", "v", "start", "q", "log_z", "log_z_ctx", "output", "weight", "first", "position"),
    *("votes", "gram", "rhs"),
)
_FIT_SIZES = ("heads", "slots", "queries", "dim", "dim_v", "fixed", "steps", "threads")
_FIT_NUMBERS = ("max_correction", "max_log_mass", "ridge", "min_ridge")


class _Nearest(ctypes.Structure):
    _fields_ = [(x, ctypes.c_void_p) for x in _NEAREST] + [(x, ctypes.c_int64) for x in _NEAREST_SIZES]


class _Segments(ctypes.Structure):
    _fields_ = [(x, ctypes.c_void_p) for x in _SEGMENTS] + [(x, ctypes.c_int64) for x in _SEGMENTS_SIZES]


class _Fit(ctypes.Structure):
    _fields_ = (
        [(x, ctypes.c_void_p) for x in _FIT]
        + [(x, ctypes.c_int64) for x in _FIT_SIZES]
        + [(x, ctypes.c_double) for x in _FIT_NUMBERS]
    )


_library = cpu_build.build("merge")  # at import: the caller falls back to torch
_nearest = cpu_build.load(_library, "keepkv_nearest")
_segments = cpu_build.load(_library, "keepkv_segments")
_fit = cpu_build.load(_library, "keepkv_fit")
_alone = cpu_build.load(_library, "keepkv_alone")
for _function in (_nearest, _segments, _fit, _alone):
    _function.argtypes = [ctypes.c_void_p]  # type: ignore[attr-defined]


def nearest_kept(
    k: torch.Tensor, dropped: torch.Tensor, kept: torch.Tensor, allowed: torch.Tensor, within: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch_impl.nearest_kept; k [H, n, D] float32 with contiguous vectors, D a multiple of 8."""
    if not supports(k):
        raise ValueError("nearest_kept takes float32 keys on a CPU, D a multiple of 8")
    given = [(x.dtype, x.is_cpu, len(x)) for x in (dropped, kept, allowed)]
    wanted = [(dtype, True, len(k)) for dtype in (torch.int64, torch.int64, torch.bool)]
    if given != wanted or kept.shape != allowed.shape:
        raise ValueError("nearest_kept takes dropped and kept of int64, allowed of bool, one row per head, on a CPU")
    dropped, kept, allowed = dropped.contiguous(), kept.contiguous(), allowed.contiguous()
    heads, r = dropped.shape
    u = kept.shape[1]
    best, column = k.new_full((heads, r), -torch.inf), torch.zeros_like(dropped)
    if r and u:
        pointers = (k, dropped, kept, allowed, best, column)
        sizes = (k.stride(1), k.stride(0), heads, k.shape[2], r, u, within, torch.get_num_threads())
        args = _Nearest(*(x.data_ptr() for x in pointers), *sizes)
        cpu_build.raise_for(_nearest(ctypes.addressof(args)))
    return best, column


def merge_segments(
    k: torch.Tensor, v: torch.Tensor, lv: torch.Tensor, log_w: torch.Tensor, seg: Segments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch_impl.merge_segments; float32, D and Dv multiples of 8 (else ValueError)."""
    given = [x.contiguous() for x in (k, v, lv, log_w)]
    heads, n, dim = k.shape
    shapes = [tuple(x.shape) for x in given]
    if shapes != [(seg.heads, n, dim), (seg.heads, n, v.shape[2]), (heads, n), tuple(seg.rows.shape)]:
        raise ValueError(f"k, v, lv, log_w {shapes} do not belong to {seg.heads} heads, {len(seg.rows)} members")
    if any(x.dtype != torch.float32 or not x.is_cpu for x in given) or dim % 8 or v.shape[2] % 8:
        raise ValueError("merge_segments takes float32 tensors on a CPU, D and Dv multiples of 8")
    indices = seg.rows, seg.offsets, seg.counts
    if any(x.dtype != torch.int64 or not x.is_cpu or not x.is_contiguous() for x in indices):
        raise ValueError("merge_segments takes contiguous int64 indices on a CPU: see Segments.from_assignment")
    out = k.new_empty(heads, seg.m, dim), v.new_empty(heads, seg.m, v.shape[2]), lv.new_empty(heads, seg.m)
    pointers = (*given, seg.rows, seg.offsets, seg.counts, *out)
    sizes = (heads * seg.m, dim, v.shape[2], torch.get_num_threads())
    args = _Segments(*(x.data_ptr() for x in pointers), *sizes)
    cpu_build.raise_for(_segments(ctypes.addressof(args)))
    return out


class Fit(NamedTuple):
    """votes [H, m]: fitted log votes. gram [H, m, m] = A A^T + lambda I and rhs [H, m, D] = A R of the values' normal
    equations, in the notation of compress/rules/attention_matching.py."""

    votes: torch.Tensor
    gram: torch.Tensor
    rhs: torch.Tensor


def fit(
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    first: torch.Tensor,
    q: torch.Tensor,
    position: torch.Tensor,
    log_z: torch.Tensor,
    log_z_ctx: torch.Tensor,
    output: torch.Tensor,
    weight: torch.Tensor,
    *,
    fixed: int,
    steps: int,
    max_correction: float,
    max_log_mass: float,
    ridge: float,
    min_ridge: float,
) -> Fit:
    """k [H, m, D], v [H, m, Dv], start [H, m] log votes: the slots to fit; first [H, m] int64: each one's first token
    in the span, -1 for a slot that no query may see. q [H, Q, D] scaled, position [Q] int64, log_z, log_z_ctx [H, Q],
    output [H, Q, Dv], weight [Q]: the queries, as compress/window.Window has them. All float32, D and Dv multiples of 8
    (else ValueError); the rest as in attention_matching.
    """
    heads, m, dim = k.shape
    queries, dim_v = q.shape[1], v.shape[2]
    given = [x.contiguous() for x in (k, v, start, q, log_z, log_z_ctx, output, weight, first, position)]
    if any(x.dtype != torch.float32 for x in given[:8]) or not all(x.is_cpu for x in given):
        raise ValueError("fit takes float32 tensors on a CPU")
    if not 0 <= fixed <= m:
        raise ValueError(f"fixed {fixed}: from 0 to the {m} slots")
    shapes = [tuple(x.shape) for x in given]
    wanted = [(heads, m, dim), (heads, m, dim_v), (heads, m), (heads, queries, dim), (heads, queries), (heads, queries)]
    wanted += [(heads, queries, dim_v), (queries,), (heads, m), (queries,)]
    if shapes != wanted or dim % 8 or dim_v % 8 or first.dtype != torch.int64 or position.dtype != torch.int64:
        raise ValueError(f"shapes {shapes}, int64 first and position: expected {wanted}, D and Dv multiples of 8")
    votes, gram, rhs = start.new_empty(heads, m), k.new_empty(heads, m, m), v.new_empty(heads, m, dim_v)
    sizes = (heads, m, queries, dim, dim_v, fixed, steps, torch.get_num_threads())
    numbers = (max_correction, max_log_mass, ridge, min_ridge)
    args = _Fit(*(x.data_ptr() for x in (*given, votes, gram, rhs)), *sizes, *numbers)
    cpu_build.raise_for(_fit(ctypes.addressof(args)))
    return Fit(votes, gram, rhs)


def compute_alone() -> None:
    """From now on this thread's operations, torch's and ours, run on it alone. torch.set_num_threads(1) would reach
    other threads: MKL is then wrong about theirs (reference.solve)."""
    torch.get_num_threads()  # its first call sets the thread's number
    _alone(None)


def supports(k: torch.Tensor) -> bool:
    """Keys (or values) that nearest_kept and merge_segments read."""
    return k.is_cpu and k.dtype == torch.float32 and k.stride(2) == 1 and k.shape[2] % 8 == 0


merges = supports
