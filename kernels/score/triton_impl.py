"""Window scores in Triton: what the queries of a window give to each token of a span, without a [n, Q] tensor.

Same numbers as keepkv_sglang.scoring.base, up to the order of float32 sums: `log_z` is `observe(...).log_z` or, without
positions, `context_log_z`; `window_score` is `Window.mean_received()` (power 1) or `received_norm() / viewers ** 0.5`
(power 2). Pooling stays with torch. Logits are formed twice, once per function, and never stored.

Differs from there: k may be 16 bit and strided, so a span need not be copied; a query that sees nothing gives
nothing. Dots of float32 are float32; 16-bit operands are multiplied as stored when both q and k are of one dtype, as
float32 otherwise. Never run on a GPU; compiled for sm_80, sm_90 and sm_100 (docs/kernels.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _logits(
    q_ptr, k_ptr, lv_ptr, head, query, token, queries, n, stride_qh, stride_qq, stride_kh, stride_kn, stride_lh,
    stride_ln, DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[Q, N] float32: q.k + lv; 0 + lv outside the queries, -inf outside the tokens."""
    d = tl.arange(0, BLOCK_D)
    mask_q, mask_n, mask_d = query < queries, token < n, d < DIM
    q = tl.load(
        q_ptr + head * stride_qh + query[:, None] * stride_qq + d[None, :],
        mask=mask_q[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    k = tl.load(
        k_ptr + head * stride_kh + token[None, :] * stride_kn + d[:, None],
        mask=mask_n[None, :] & mask_d[:, None], other=0.0,
    )  # fmt: skip
    if UPCAST:
        logits = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee")
    else:
        logits = tl.dot(q, k)
    lv = tl.load(lv_ptr + head * stride_lh + token * stride_ln, mask=mask_n, other=0.0).to(tl.float32)
    return tl.where(mask_n[None, :], logits + lv[None, :], float("-inf"))


@triton.jit
def log_z_kernel(
    q_ptr, k_ptr, lv_ptr, position_ptr, start_ptr, out_ptr, queries, n,
    stride_qh, stride_qq, stride_kh, stride_kn, stride_lh, stride_ln,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_START: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head): running maximum and sum over the tokens that the tile's queries see."""
    head = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = query < queries
    last = tl.zeros([BLOCK_Q], tl.int32) + n - 1
    if HAS_POSITION:
        last = tl.minimum(last, tl.load(position_ptr + query // GROUP, mask=mask_q, other=-1).to(tl.int32))
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if HAS_START:
        top = tl.load(start_ptr + head * queries + query, mask=mask_q, other=float("-inf"))
        total = tl.where(top > float("-inf"), 1.0, 0.0)
    for start in range(0, tl.max(last, 0) + 1, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        logits = _logits(
            q_ptr, k_ptr, lv_ptr, head, query, token, queries, n, stride_qh, stride_qq, stride_kh, stride_kn, stride_lh,
            stride_ln, DIM, BLOCK_D, UPCAST,
        )  # fmt: skip
        logits = tl.where(token[None, :] <= last[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = new_top
    tl.store(out_ptr + head * queries + query, top + tl.log(tl.where(total > 0, total, 1.0)), mask=mask_q)


@triton.jit
def window_score_kernel(
    q_ptr, k_ptr, lv_ptr, position_ptr, log_z_ptr, out_ptr, queries, n,
    stride_qh, stride_qq, stride_kh, stride_kn, stride_lh, stride_ln,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SQUARE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (token tile, head): sums over all queries, and counts those that see each token."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    viewers = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, queries, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        mask_q = query < queries
        logits = _logits(
            q_ptr, k_ptr, lv_ptr, head, query, token, queries, n, stride_qh, stride_qq, stride_kh, stride_kn, stride_lh,
            stride_ln, DIM, BLOCK_D, UPCAST,
        )  # fmt: skip
        log_z = tl.load(log_z_ptr + head * queries + query, mask=mask_q, other=0.0)
        last = tl.load(position_ptr + query // GROUP, mask=mask_q, other=-1).to(tl.int32)
        seen = token[None, :] <= last[:, None]
        # inside the where: exp of what a query does not see can overflow, and exp(-inf - -inf) is NaN
        weights = tl.where(seen & (log_z > float("-inf"))[:, None], tl.exp(logits - log_z[:, None]), 0.0)
        if SQUARE:
            weights = weights * weights
        total += tl.sum(weights, 0)
        viewers += tl.sum(seen.to(tl.int32), 0)
    mean = total / tl.maximum(viewers, 1).to(tl.float32)
    if SQUARE:
        mean = tl.sqrt(mean)
    tl.store(out_ptr + head * n + token, mean, mask=token < n)


def log_z(
    q: torch.Tensor,
    k: torch.Tensor,
    lv: torch.Tensor,
    position: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """[H, Q] float32: log(exp(start) + sum_i p_i exp(q.k_i)) over the tokens i <= position[j] (all without position).

    q [H, Q, D] scaled, window-major (row j * G + g); k [H, n, D] and lv [H, n], any strides but contiguous D;
    position [w] integers, w divides Q; start [H, Q] float32, -inf for nothing. A query that sees nothing and has no
    start gives -inf. n or Q may be 0. ValueError for other shapes and dtypes.
    """
    group = _check(q, k, lv, position)
    heads, queries, dim = q.shape
    out = torch.empty(heads, queries, dtype=torch.float32, device=q.device)
    if start is not None:
        if start.shape != out.shape or start.dtype != torch.float32:
            raise ValueError(f"start must be float32 {tuple(out.shape)}, got {start.dtype} {tuple(start.shape)}")
        start = start.contiguous()
    if queries == 0:
        return out
    block_q, block_n, block_d = _tiles(q, k)
    log_z_kernel[(triton.cdiv(queries, block_q), heads)](
        q, k, lv, position, start, out, queries, k.shape[1], *_strides(q, k, lv),
        GROUP=group, DIM=dim, BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d,
        HAS_POSITION=position is not None, HAS_START=start is not None, UPCAST=_upcast(q, k),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def window_score(
    q: torch.Tensor, k: torch.Tensor, lv: torch.Tensor, position: torch.Tensor, log_z: torch.Tensor, power: int = 1
) -> torch.Tensor:
    """[H, n] float32: (mean over the queries that see token i of (p_i exp(q.k_i) / Z_q)^power)^(1 / power).

    power 1: SnapKV before pooling (arXiv 2404.14469); 2: scorer `rms` (arXiv 2602.16284). 0 for a token that no query
    sees. Shapes as in `log_z`, whose result (causal, with the context in `start`) is log_z [H, Q]. ValueError for other
    shapes, dtypes and powers.
    """
    group = _check(q, k, lv, position)
    heads, queries, dim = q.shape
    if power not in (1, 2):
        raise ValueError(f"power {power}: 1 (mean) or 2 (root mean square)")
    if log_z.shape != q.shape[:2] or log_z.dtype != torch.float32:
        raise ValueError(f"log_z must be float32 {tuple(q.shape[:2])}, got {log_z.dtype} {tuple(log_z.shape)}")
    n = k.shape[1]
    out = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    if n == 0:
        return out
    block_q, block_n, block_d = _tiles(q, k)
    window_score_kernel[(triton.cdiv(n, block_n), heads)](
        q, k, lv, position, log_z.contiguous(), out, queries, n, *_strides(q, k, lv),
        GROUP=group, DIM=dim, BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d,
        SQUARE=power == 2, UPCAST=_upcast(q, k), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _check(q: torch.Tensor, k: torch.Tensor, lv: torch.Tensor, position: torch.Tensor | None) -> int:
    """q heads per kv head."""
    if q.dim() != 3 or k.dim() != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]) or lv.shape != k.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, lv {tuple(lv.shape)}"
        raise ValueError(f"{shapes}: need [H, Q, D], [H, n, D] and [H, n]")
    if q.dtype not in _DTYPES or k.dtype not in _DTYPES or lv.dtype not in _DTYPES:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, lv {lv.dtype}: use float32, bfloat16 or float16")
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError("q and k need contiguous head_dim: call .contiguous()")
    if position is None or q.shape[1] == 0:
        return 1
    if position.is_floating_point() or position.dim() != 1 or len(position) == 0 or q.shape[1] % len(position):
        raise ValueError(f"position must be integers [w] with w dividing the {q.shape[1]} queries")
    return q.shape[1] // len(position)


def _interpreted() -> bool:
    return not isinstance(log_z_kernel, triton.runtime.JITFunction)


def _upcast(q: torch.Tensor, k: torch.Tensor) -> bool:
    return _interpreted() or q.dtype != k.dtype or q.dtype == torch.float32


def _tiles(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int]:
    """(queries, tokens, head_dim) of a tile. float32 dots keep both operands in registers: small tiles do not spill."""
    block_d = max(16, triton.next_power_of_2(q.shape[2]))
    small = _upcast(q, k) and not _interpreted()
    return (32, 32, block_d) if small else (64, 64, block_d)


def _strides(q: torch.Tensor, k: torch.Tensor, lv: torch.Tensor) -> tuple[int, ...]:
    return q.stride(0), q.stride(1), k.stride(0), k.stride(1), lv.stride(0), lv.stride(1)
