"""Vote-weighted attention in plain torch: slower, and always there. See the package's docstring for the
contract."""

from __future__ import annotations

import torch

from .contract import MASKED, as_int64, check, refuse_packed
from .packed import Packed

name = "torch"

# Queries are taken in slices so that the logits of one slice stay under this many elements (128 MiB of
# float32).
_MAX_LOGITS = 1 << 25
OUTSIDE = "attention: rows, seq_lens or extend_lens point outside req_to_token"


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    votes: torch.Tensor | None,
    first_visible: int | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """One request: q [N, Hq, D], k, v [L, Hkv, D], votes [L, Hkv] or None, query j sees first_visible + j
    keys."""
    n, heads_q, dim = q.shape
    length, heads_kv, _ = k.shape
    group = heads_q // heads_kv
    kt, v = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    # A zero bias is added without votes too: with and without zero votes the bits agree.
    bias = k.new_zeros(length, heads_kv, dtype=torch.float32) if votes is None else votes
    bias = bias.masked_fill(bias <= MASKED, float("-inf")).t().reshape(heads_kv, 1, 1, length)
    step = max(1, _MAX_LOGITS // (heads_q * length))
    for a in range(0, n, step):
        part = q[a : a + step].float()
        m = part.shape[0]
        rows = part.view(m, heads_kv, group, dim).permute(1, 2, 0, 3).reshape(heads_kv, group * m, dim)
        logits = torch.matmul(rows, kt).view(heads_kv, group, m, length).mul_(scale).add_(bias)
        if first_visible is not None and first_visible + a < length:
            last = torch.arange(first_visible + a, first_visible + a + m)
            logits.masked_fill_(torch.arange(length) >= last[:, None], float("-inf"))
        top = logits.amax(dim=-1, keepdim=True)
        weights = logits.sub_(top.masked_fill_(top == float("-inf"), 0.0)).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        summed = torch.matmul(weights.view(heads_kv, group * m, length), v).view(heads_kv, group, m, dim)
        summed /= total.masked_fill_(total == 0, 1.0)
        out[a : a + step] = summed.permute(2, 0, 1, 3).reshape(m, heads_q, dim)


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
    refuse_packed(packed)
    q = check(q, k_pool, v_pool, log_votes, req_to_token, out)
    batch = len(rows)
    rows, seq_lens = as_int64(rows, "rows", batch), as_int64(seq_lens, "seq_lens", batch)
    extend_lens = as_int64(extend_lens, "extend_lens", batch)
    if int(extend_lens.sum()) != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows, the lengths ask for {int(extend_lens.sum())}")
    start = 0
    for row, length, new in zip(rows.tolist(), seq_lens.tolist(), extend_lens.tolist(), strict=True):
        queries, result = q[start : start + new], out[start : start + new]
        start += new
        if new < 0 or not 0 <= length <= req_to_token.shape[1]:
            raise IndexError(OUTSIDE)
        if length == 0:
            result.zero_()
            continue
        if not 0 <= row < req_to_token.shape[0] or new > length:
            raise IndexError(OUTSIDE)
        slots = req_to_token[row, :length].long()
        votes = None if log_votes is None else log_votes.index_select(0, slots)
        k, v = k_pool.index_select(0, slots), v_pool.index_select(0, slots)
        _attend(queries, k, v, votes, length - new + 1 if causal else None, scale, result)


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
    refuse_packed(packed)
    ones = torch.ones(q.shape[0], dtype=torch.int64)
    extend(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, ones, scale, out)
