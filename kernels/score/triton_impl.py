"""Window scores in Triton: what the queries of a window give to each token of a span, without a [n, Q] tensor.

`window_sums` gives what kernels/score/cpp_impl.py gives, up to the order of float32 sums. Two kernels: per tile of
queries the denominators (and outputs, as flash attention does), then per tile of tokens the sums over the queries,
which forms the logits once more. Keys and values are read where they lie, 16 bit or float32.

Products are float32 ("ieee") where keys are. 16-bit keys and values are exact in TF32, which tensor cores multiply;
what meets them is cut into two halves of TF32, so that 21 bits of it count: log Z must agree with logits that torch
computes. A query that sees nothing gives nothing. What has run on a GPU: docs/gpu.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import Sums, check_window

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b, float32; with "tf32" b must be exact in TF32. Tensor cores cut operands off after 10 bits, so a is split."""
    if PRECISION == "tf32":
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return tl.dot(high, b, input_precision="tf32") + tl.dot(a - high, b, input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _logits(
    q_ptr, k_ptr, lv_ptr, head, query, token, queries, n, stride_kh, stride_kn, stride_lh, stride_ln,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[Q, N] float32: q.k + lv; 0 + lv outside the queries, -inf outside the tokens."""
    d = tl.arange(0, BLOCK_D)
    mask_q, mask_n, mask_d = query < queries, token < n, d < DIM
    q = tl.load(
        q_ptr + (head * queries + query[:, None]) * DIM + d[None, :], mask=mask_q[:, None] & mask_d[None, :], other=0.0
    )
    k = tl.load(
        k_ptr + head * stride_kh + token[None, :] * stride_kn + d[:, None],
        mask=mask_n[None, :] & mask_d[:, None], other=0.0,
    )  # fmt: skip
    logits = _dot(q, k.to(tl.float32), PRECISION)
    lv = tl.load(lv_ptr + head * stride_lh + token * stride_ln, mask=mask_n, other=0.0)
    return tl.where(mask_n[None, :], logits + lv[None, :], float("-inf"))


@triton.jit(do_not_specialize=["queries", "n", "stride_lh", "stride_ln"])
def observe_kernel(
    q_ptr, k_ptr, v_ptr, lv_ptr, position_ptr, start_ptr, log_z_ptr, out_ptr, queries, n,
    stride_kh, stride_kn, stride_vh, stride_vn, stride_lh, stride_ln,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, HAS_START: tl.constexpr, HAS_OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head): running maximum and sum over the tokens that the tile's queries see, and with
    HAS_OUTPUT the sum of their values. Without start_ptr all tokens are seen."""
    head = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q, dv = query < queries, tl.arange(0, BLOCK_V)
    last = tl.zeros([BLOCK_Q], tl.int32) + n - 1
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    if HAS_START:
        last = tl.minimum(last, tl.load(position_ptr + query, mask=mask_q, other=-1).to(tl.int32))
        top = tl.load(start_ptr + head * queries + query, mask=mask_q, other=float("-inf"))
        total = tl.where(top > float("-inf"), 1.0, 0.0)
    for start in range(0, tl.max(last, 0) + 1, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        logits = _logits(
            q_ptr, k_ptr, lv_ptr, head, query, token, queries, n, stride_kh, stride_kn, stride_lh, stride_ln,
            DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        logits = tl.where(token[None, :] <= last[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, decay = tl.exp(logits - shift[:, None]), tl.exp(top - shift)
        total = total * decay + tl.sum(weights, 1)
        if HAS_OUTPUT:
            values = tl.load(
                v_ptr + head * stride_vh + token[:, None] * stride_vn + dv[None, :],
                mask=(token < n)[:, None] & (dv < DIM_V)[None, :], other=0.0,
            )  # fmt: skip
            out = out * decay[:, None] + _dot(weights, values.to(tl.float32), PRECISION)
        top = new_top
    total = tl.where(total == 0, 1.0, total)  # nothing seen: log Z is top, -inf. A NaN stays one
    tl.store(log_z_ptr + head * queries + query, top + tl.log(total), mask=mask_q)
    if HAS_OUTPUT:
        out = out / total[:, None]
        mask = mask_q[:, None] & (dv < DIM_V)[None, :]
        tl.store(out_ptr + (head * queries + query[:, None]) * DIM_V + dv[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["queries", "n", "heads", "stride_lh", "stride_ln"])
def sums_kernel(
    q_ptr, k_ptr, lv_ptr, position_ptr, log_z_ptr, weights_ptr, received_ptr, squares_ptr, queries, n, heads,
    stride_kh, stride_kn, stride_lh, stride_ln,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (token tile, head): log of the sum of the weights that all queries give to each token, shifted by its
    largest term, and sums of squares over those that see it."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    received = tl.zeros([BLOCK_N], tl.float32)
    first, second = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, queries, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        mask_q = query < queries
        logits = _logits(
            q_ptr, k_ptr, lv_ptr, head, query, token, queries, n, stride_kh, stride_kn, stride_lh, stride_ln,
            DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        log_z = tl.load(log_z_ptr + head * queries + query, mask=mask_q, other=float("-inf"))
        # inside the where: -inf - -inf is NaN
        a = tl.where((log_z > float("-inf"))[:, None], logits - log_z[:, None], float("-inf"))
        new_top = tl.maximum(top, tl.max(a, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        received = received * tl.exp(top - shift) + tl.sum(tl.exp(a - shift[None, :]), 0)
        top, a = new_top, tl.exp(a)
        last = tl.load(position_ptr + query, mask=mask_q, other=-1).to(tl.int32)
        a = tl.where(token[None, :] <= last[:, None], a * a, 0.0)  # what a query does not see can overflow
        if ROWS > 0:
            first += tl.sum(a * tl.load(weights_ptr + query, mask=mask_q, other=0.0)[:, None], 0)
        if ROWS > 1:
            second += tl.sum(a * tl.load(weights_ptr + queries + query, mask=mask_q, other=0.0)[:, None], 0)
    received = tl.where(top == float("-inf"), top, top + tl.log(received))
    tl.store(received_ptr + head * n + token, received, mask=token < n)
    if ROWS > 0:
        tl.store(squares_ptr + head * n + token, first, mask=token < n)
    if ROWS > 1:
        tl.store(squares_ptr + (heads + head) * n + token, second, mask=token < n)


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
    stored: one of float32, bfloat16, float16, votes float32, any strides with contiguous vectors. weights [R, Q]
    float32, R at most 2. ValueError for anything else.
    """
    check_window(q, position, k_ctx, lv_ctx, k, v, lv, weights)
    if not supports(k_ctx, k, v):
        raise ValueError("window_sums takes keys and values of float32, bfloat16 or float16, contiguous vectors")
    heads, queries, _ = q.shape
    n = k.shape[0]
    q, position, weights = q.contiguous(), position.contiguous(), weights.contiguous()
    log_z_ctx, log_z = q.new_full((heads, queries), -torch.inf), q.new_empty(heads, queries)
    received, squares = q.new_empty(heads, n), q.new_empty(len(weights), heads, n)
    output = q.new_empty(heads, queries, v.shape[2]) if outputs else None
    if queries and len(k_ctx):
        _observe(q, k_ctx, None, lv_ctx, None, None, log_z_ctx, None)
    if queries and n:
        _observe(q, k, v, lv, position, log_z_ctx, log_z, output)
        _sums(q, k, lv, position, log_z, weights, received, squares)
    else:
        log_z.copy_(log_z_ctx)
        received.fill_(-torch.inf)
        for x in (squares, output):
            if x is not None:
                x.zero_()
    return Sums(log_z, log_z_ctx, None, received, squares, output)


def supports(k_ctx: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Storage that the kernels read."""
    alike = k.dtype in _DTYPES and k_ctx.dtype == k.dtype == v.dtype
    return alike and all(x.stride(2) == 1 for x in (k_ctx, k, v))


def _observe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    lv: torch.Tensor,
    position: torch.Tensor | None,
    start: torch.Tensor | None,
    log_z: torch.Tensor,
    output: torch.Tensor | None,
) -> None:
    heads, queries, dim = q.shape
    queries_at, tokens_at, block_d, launch = _tile(k, dim)
    dim_v = v.shape[2] if v is not None else dim
    stride_v = (v.stride(1), v.stride(0)) if v is not None else (0, 0)
    observe_kernel[(triton.cdiv(queries, queries_at), heads)](
        q, k, v, lv, position, start, log_z, output, queries, k.shape[0],
        k.stride(1), k.stride(0), *stride_v, lv.stride(1), lv.stride(0),
        DIM=dim, DIM_V=dim_v, BLOCK_Q=queries_at, BLOCK_N=tokens_at, BLOCK_D=block_d,
        BLOCK_V=max(16, triton.next_power_of_2(dim_v)), HAS_START=start is not None, HAS_OUTPUT=output is not None,
        PRECISION=_precision(k), **launch,
    )  # fmt: skip


def _sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lv: torch.Tensor,
    position: torch.Tensor,
    log_z: torch.Tensor,
    weights: torch.Tensor,
    received: torch.Tensor,
    squares: torch.Tensor,
) -> None:
    heads, queries, dim = q.shape
    tokens_at, queries_at, block_d, launch = _tile(k, dim)
    sums_kernel[(triton.cdiv(k.shape[0], tokens_at), heads)](
        q, k, lv, position, log_z, weights, received, squares, queries, k.shape[0], heads,
        k.stride(1), k.stride(0), lv.stride(1), lv.stride(0),
        ROWS=len(weights), DIM=dim, BLOCK_Q=queries_at, BLOCK_N=tokens_at, BLOCK_D=block_d,
        PRECISION=_precision(k), **launch,
    )  # fmt: skip


def _interpreted() -> bool:
    return not isinstance(sums_kernel, triton.runtime.JITFunction)


def _precision(k: torch.Tensor) -> str:
    return "ieee" if k.dtype == torch.float32 else "tf32"


def _tile(k: torch.Tensor, dim: int) -> tuple[int, int, int, dict[str, int]]:
    """(a program's own queries or tokens, those that it goes through at a time, head_dim, warps and stages): such that
    hardly anything spills (compile_gate.py); of 16-bit keys the fastest of 16 on an H200 at head_dim 128 (docs/log.md).
    """
    block_d = max(16, triton.next_power_of_2(dim))
    if _precision(k) == "tf32" and block_d <= 128:
        return 32, 64, block_d, {"num_warps": 4, "num_stages": 2}
    exact = _precision(k) == "ieee" and not _interpreted()
    block = 16 if block_d > 128 else 32 if exact or block_d > 64 else 64
    warps = 8 if block == 64 or (exact and block_d == 128) else 4
    return block, block, block_d, {"num_warps": warps, "num_stages": 1}
