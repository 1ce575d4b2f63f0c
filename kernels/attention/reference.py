"""The equation, line by line, as the oracle of every other implementation.

Eq. 6 of KeepKV (arXiv 2504.09936): an entry that stands for p_i merged tokens keeps p_i votes and

    o_t = sum_i p_i exp(s_i) v_i / sum_i p_i exp(s_i),        s_i = (q_t . k_i) * scale

p_i exp(s_i) = exp(s_i + log p_i), so votes are an additive bias on the logits; log_votes = 0 is plain
attention. Everything is computed in q's dtype: call it with float64 tensors to get a float64 answer.
"""

from __future__ import annotations

import torch

from .contract import MASKED
from .packed import Packed


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_votes: torch.Tensor | None,
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Vote-weighted attention of one request.

    q [N, Hq, D]; k, v [L, Hkv, D]; log_votes [L, Hkv] or None; visible [N, L] bool. Returns [N, Hq, D] in q's
    dtype. A query that sees no entry, or only masked ones (log vote <= MASKED), gets zeros.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("nhd,lhd->nhl", q, k) * scale
    if log_votes is not None:
        votes = log_votes.to(q.dtype).masked_fill(log_votes <= MASKED, float("-inf"))
        logits = logits + votes.repeat_interleave(group, dim=1).t()
    logits = logits.masked_fill(~visible[:, None, :], float("-inf"))
    top = logits.amax(dim=-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(*logits.shape[:2], 1)
    weights = torch.exp(logits - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return torch.einsum("nhl,lhd->nhd", weights, v)


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
    """Same contract as the package's decode; out may have any float dtype."""
    ones = torch.ones_like(seq_lens)
    extend(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, ones, scale, out, packed=packed)


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
    """Same contract as the package's extend; out may have any float dtype."""
    start = 0
    for request, (row, length, new) in enumerate(
        zip(rows.tolist(), seq_lens.tolist(), extend_lens.tolist(), strict=True)
    ):
        slots = req_to_token[row, :length].long()
        last = torch.arange(length - new, length) if causal else torch.full((new,), length)
        visible = torch.arange(length)[None, :] <= last[:, None]
        votes = None if log_votes is None else log_votes[slots]
        queries = q[start : start + new]
        k, v = k_pool[slots], v_pool[slots]
        if packed is None or votes is None:
            out[start : start + new] = attend(queries, k, v, votes, visible, scale)
        else:
            for head in range(k.shape[1]):
                _attend_head(queries, k, v, votes, visible, scale, packed, request, head, out[start : start + new])
        start += new


def _attend_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_votes: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    packed: Packed,
    request: int,
    head: int,
    out: torch.Tensor,
) -> None:
    """attend() of one kv head, with its cells in front of the slots: every query sees them."""
    cells = packed.runs(request, packed.layer, head).tolist()
    pools = (packed.layers.keys, packed.layers.values, packed.layers.log_votes)
    keys, values, votes = (
        torch.stack([pool[layer][slot, h] for layer, slot, h in cells] + list(own[:, head]))
        for pool, own in zip(pools, (k, v, log_votes), strict=True)
    )
    group = q.shape[1] // k.shape[1]
    own_heads = slice(head * group, (head + 1) * group)
    seen = torch.cat((visible.new_ones(len(visible), len(cells)), visible), 1)
    out[:, own_heads] = attend(q[:, own_heads], keys[:, None], values[:, None], votes[:, None], seen, scale)
