"""Vote-weighted attention in Triton: the contract of the package's docstring, on a GPU or in Triton's interpreter.

An oracle and a fallback on GPUs: `keepkv_triton` serves with SGLang's own kernels and `triton_score_mod`. Nothing here
synchronises with the device: lengths, rows and slots stay there.

Differs from the contract: float16 storage too; indices are not checked (an index outside the pool reads memory that is
not the pool's); K and V of float32 are multiplied in float32, 16-bit ones in their own dtype with float32 sums, where
the softmax weights are rounded to that dtype, as in FlashAttention. The split of a decode depends on the batch size, so
its bits do too. In the interpreter everything is multiplied in float32.

What has run on a GPU: docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from .contract import GPU_STORAGE_DTYPES, check_layout
from .triton_kernels import decode_merge, decode_split, extend_tile

name = "triton"

# Programs of a decode that fill a GPU of about 130 multiprocessors; more splits only add merging.
_DECODE_PROGRAMS = 256
_MAX_SPLITS = 32
Lengths = torch.Tensor | Sequence[int]


def interpreted() -> bool:
    """Whether kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1 before the first import)."""
    return not isinstance(decode_split, triton.runtime.JITFunction)


def decode(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, scale, out) -> None:
    """One query per request; see the package's docstring for shapes. Allocates float32 scratch
    [B, Hq, splits, D] and [B, Hq, splits]. ValueError for shapes and dtypes outside the contract."""
    check_layout(q, k_pool, v_pool, log_votes, req_to_token, out, GPU_STORAGE_DTYPES)
    q, batch = _packed(q), q.shape[0]
    heads, dim, heads_kv = q.shape[1], q.shape[2], k_pool.shape[1]
    rows, seq_lens = _on(rows, "rows", batch, q.device), _on(seq_lens, "seq_lens", batch, q.device)
    if batch == 0:
        return
    group = heads // heads_kv
    up = upcast(q, k_pool)
    block_h = min(16 if up else 64, max(16, triton.next_power_of_2(group)))
    tiles = heads_kv * triton.cdiv(group, block_h)
    splits = decode_splits(batch * tiles)
    part = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(dim)
    decode_split[(batch, tiles, splits)](
        q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, part, lse,
        scale, q.stride(0), q.stride(1), k_pool.stride(0), v_pool.stride(0),
        0 if log_votes is None else log_votes.stride(0), req_to_token.stride(0),
        HEADS_KV=heads_kv, GROUP=group, DIM=dim, BLOCK_H=block_h, BLOCK_N=32, BLOCK_D=block_d, SPLITS=splits,
        HAS_VOTES=log_votes is not None, UPCAST=up, num_warps=4, num_stages=2,
    )  # fmt: skip
    result = _result(out)
    decode_merge[(batch, heads)](
        part, lse, result, result.stride(0), result.stride(1),
        HEADS=heads, DIM=dim, BLOCK_D=block_d, SPLITS=splits, num_warps=4, num_stages=1,
    )  # fmt: skip
    if result is not out:
        out.copy_(result)


def extend(
    q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, extend_lens, scale, out, causal: bool = True
) -> None:
    """The queries of request b are the last extend_lens[b] of its seq_lens[b] slots; see the package's docstring.

    ValueError for shapes and dtypes outside the contract, and for lengths that do not add up when they are on the host.
    """
    check_layout(q, k_pool, v_pool, log_votes, req_to_token, out, GPU_STORAGE_DTYPES)
    q, batch = _packed(q), len(rows)
    if not isinstance(extend_lens, torch.Tensor) or extend_lens.is_cpu:
        wanted = int(torch.as_tensor(extend_lens).sum())
        if wanted != q.shape[0]:
            raise ValueError(f"q has {q.shape[0]} rows, the lengths ask for {wanted}")
    rows, seq_lens = _on(rows, "rows", batch, q.device), _on(seq_lens, "seq_lens", batch, q.device)
    extend_lens = _on(extend_lens, "extend_lens", batch, q.device)
    if q.shape[0] == 0:
        return
    heads, dim, heads_kv = q.shape[1], q.shape[2], k_pool.shape[1]
    group, up = heads // heads_kv, upcast(q, k_pool)
    block_d = triton.next_power_of_2(dim)
    # float32 dots hold both operands in registers: larger tiles spill kilobytes
    block_m, block_n = (32, 16) if up and not interpreted() else (64, 64 if block_d <= 128 else 32)
    result = _result(out)
    extend_tile[(triton.cdiv(q.shape[0] * group, block_m) + batch, heads_kv)](
        q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, extend_lens, result,
        batch, scale, q.stride(0), q.stride(1), result.stride(0), result.stride(1), k_pool.stride(0), v_pool.stride(0),
        0 if log_votes is None else log_votes.stride(0), req_to_token.stride(0),
        GROUP=group, DIM=dim, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        HAS_VOTES=log_votes is not None, CAUSAL=causal, UPCAST=up,
        num_warps=4 if block_d <= 64 else 8, num_stages=2 if block_d <= 128 else 1,
    )  # fmt: skip
    if result is not out:
        out.copy_(result)


def decode_splits(programs: int) -> int:
    """Into how many parts each of so many programs of a decode is split, a power of two."""
    return min(_MAX_SPLITS, triton.next_power_of_2(triton.cdiv(_DECODE_PROGRAMS, programs)))


def upcast(q: torch.Tensor, k_pool: torch.Tensor) -> bool:
    """Whether keys and values are multiplied in float32."""
    return interpreted() or torch.float32 in (q.dtype, k_pool.dtype)


def _result(out: torch.Tensor) -> torch.Tensor:
    """What a kernel writes: `out`, or float32 where the interpreter would cut bfloat16 off instead of rounding it."""
    return torch.empty_like(out, dtype=torch.float32) if interpreted() and out.dtype == torch.bfloat16 else out


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _on(values: Lengths, what: str, size: int, device: torch.device) -> torch.Tensor:
    """A contiguous integer vector on the device. ValueError when the length differs."""
    tensor = torch.as_tensor(values, device=device).contiguous()
    if tensor.numel() != size:
        raise ValueError(f"{what} has {tensor.numel()} entries, expected {size} (one per request)")
    return tensor
