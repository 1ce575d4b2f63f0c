"""Layers of a few tokens for the tests of merge rules."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.layer import LayerInput, merge_from_assignment
from keepkv_sglang.compress.select import SpanPolicy

F64 = torch.float64


def policy(m: int, merge: str, **changes) -> SpanPolicy:
    return SpanPolicy(**{"m": m, "merge": merge, "recent": 4, "sinks": 2, "threshold": 0.6, **changes})


def layer(n=60, heads=2, group=3, w=6, ctx=0, dim=8, dtype=F64, seed=0, behind=0, spread=1.0) -> LayerInput:
    """Random layer whose keys share a direction, so that many cosines pass 0.6. `spread` scales logits."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    lv = [torch.rand(t, heads, generator=g, dtype=F64) * 2 for t in (ctx, n)]
    q, k = normal(w, heads * group, dim) * spread, normal(n, heads, dim) * 0.7 + 1
    k_ctx, v = normal(ctx, heads, dim), normal(n, heads, dim)
    q_index = torch.arange(n - w - behind, n - behind)
    q, k_ctx, lv_ctx, k, v, own = (t.to(dtype) for t in (q, k_ctx, lv[0], k, v, lv[1]))
    return LayerInput(q, q_index, k_ctx, lv_ctx, k, v, own, dim**-0.5)


def tiny(q: list, k: list, v: list, votes: list, scale=1.0) -> LayerInput:
    """One kv head; q [w, G, D], k [n, D], v [n, D]. All queries see all tokens."""
    q, k, v = (torch.tensor(t, dtype=F64) for t in (q, k, v))
    k, v, lv = k[:, None], v[:, None], torch.tensor(votes, dtype=F64).log()[:, None]
    seen = torch.full((len(q),), len(k) - 1)
    return LayerInput(q, seen, k[:0], lv[:0], k, v, lv, scale)


def one_cluster(x: LayerInput, rule: str):
    """Token 0 kept, all others merged into it -> k [D], v [D], votes."""
    zero = torch.zeros(1, x.k.shape[0], dtype=torch.int64)
    k, v, lv = merge_from_assignment(x, zero[:, :1], zero, rule)
    return k[0, 0], v[0, 0], float(lv[0, 0].exp())


def log_mass(q, k, lv, scale=1.0):
    """log sum_i p_i exp(scale q.k_i) for q [..., D], k [n, D], lv [n]."""
    return torch.logsumexp(q @ k.T * scale + lv, -1)
