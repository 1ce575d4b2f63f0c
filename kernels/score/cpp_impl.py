"""What a window of queries sees of a span, in C++ (cpu_score.cpp): denominators, sums per token, attention outputs.

One pass: the logits of a panel of queries (AVX-512: 64, 256 bytes a token; AVX2: 16; else 8) are computed once and read
while they are in the cache. Deterministic: a head's bits do not depend on the
other heads or on the number of threads (torch.get_num_threads() are used).
"""

from __future__ import annotations

import ctypes

import torch

from keepkv_sglang.kernels import cpu_build
from keepkv_sglang.kernels.score import Sums, check_window

_POINTERS = (
    *("q", "k_ctx", "k", "v", "lv_ctx", "lv", "position", "weights"),
    *("log_z", "log_z_ctx", "received", "squares", "output"),
)
_SIZES = (
    *("k_ctx_token", "k_ctx_head", "lv_ctx_token", "lv_ctx_head"),
    *("k_token", "k_head", "v_token", "v_head", "lv_token", "lv_head"),
    *("heads", "queries", "dim", "dim_v", "context", "tokens", "rows", "threads"),
)
STORAGE_DTYPES = (torch.float32, torch.bfloat16)


class _Args(ctypes.Structure):
    _fields_ = [(field, ctypes.c_void_p) for field in _POINTERS] + [(field, ctypes.c_int64) for field in _SIZES]


_function = cpu_build.load(cpu_build.build("score"), "keepkv_score")  # at import: the caller falls back to torch
_function.argtypes = [ctypes.c_void_p, ctypes.c_int]  # type: ignore[attr-defined]


def window_sums(
    q: torch.Tensor,
    position: torch.Tensor,
    k_ctx: torch.Tensor,
    lv_ctx: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lv: torch.Tensor,
    weights: torch.Tensor,
    outputs: bool,
) -> Sums:
    """q [H, Q, D] float32, already scaled; position [Q] int64: the last token of the span that each row sees. k_ctx [c,
    H, D], lv_ctx [c, H]: what precedes the span, c may be 0; k [n, H, D], v [n, H, Dv], lv [n, H]: the span, as
    stored: float32 or bfloat16 in all three, votes float32, any strides with contiguous vectors; D and Dv multiples of
    8. weights [R, Q] float32, R at most 2. ValueError for anything else, MemoryError without room for scratch.
    """
    check_window(q, position, k_ctx, lv_ctx, k, v, lv, weights)
    if not supports(k_ctx, k, v) or not all(x.is_cpu for x in (q, position, lv_ctx, lv, weights)):
        raise ValueError(
            "on a CPU window_sums takes float32 or bfloat16 keys and values, vectors of 8, 16, ... numbers"
        )
    heads, queries, dim = q.shape
    tokens = k.shape[0]
    q, position, weights = q.contiguous(), position.contiguous(), weights.contiguous()
    log_z, log_z_ctx = q.new_empty(heads, queries), q.new_empty(heads, queries)
    received, squares = q.new_empty(heads, tokens), q.new_empty(len(weights), heads, tokens)
    output = q.new_empty(heads, queries, v.shape[2]) if outputs else None
    pointers = (q, k_ctx, k, v, lv_ctx, lv, position, weights, log_z, log_z_ctx, received, squares, output)
    strides = [s for x in (k_ctx, lv_ctx, k, v, lv) for s in x.stride()[:2]]
    sizes = (heads, queries, dim, v.shape[2], k_ctx.shape[0], tokens, len(weights), torch.get_num_threads())
    args = _Args(*(x.data_ptr() if x is not None else None for x in pointers), *strides, *sizes)
    cpu_build.raise_for(_function(ctypes.addressof(args), k.dtype == torch.bfloat16))
    return Sums(log_z, log_z_ctx, received, None, squares, output)


def supports(k_ctx: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Storage that the kernel reads."""
    alike = k.dtype in STORAGE_DTYPES and k_ctx.dtype == k.dtype == v.dtype
    packed = all(x.is_cpu and x.stride(2) == 1 and x.shape[2] % 8 == 0 for x in (k_ctx, k, v))
    return alike and packed
