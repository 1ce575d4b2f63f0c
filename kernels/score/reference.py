"""Selection scores in loops over tokens and queries, any float dtype. The oracle of keepkv_sglang/compress/scorers.

Notation as in kernels/merge/reference.py, which has the pooled scores of SnapKV and KeepKV.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from keepkv_sglang.kernels.head import RECENCY_HALF_LIFE, Head, head_of

GKV_DECAY = 0.8


def _attention(a: Head) -> torch.Tensor:
    """[n, Q]: p_i exp(l_iq) / Z_q, 0 for what the query does not see."""
    return (a.lv[:, None] + a.logits - a.log_z).exp().masked_fill(~a.seen, 0.0)


def tova(a: Head, group: int) -> list[float]:
    """arXiv 2401.06104: the last query's attention, mean over the group."""
    attention = _attention(a)[:, -group:].mean(1)
    return [float(x) if seen else -math.inf for x, seen in zip(attention, a.seen[:, -1], strict=True)]


def gkv(a: Head, group: int) -> list[float]:
    """arXiv 2512.00504: F_t = max(alpha F_{t-1}, S_t / max S_t), one step per query, from the oldest on; its log."""
    step = _attention(a).unflatten(1, (-1, group)).amax(2)
    total = torch.zeros(len(a.k), dtype=a.k.dtype)
    for t in range(step.shape[1]):
        total = torch.maximum(GKV_DECAY * total, step[:, t] / step[:, t].max())
    return total.log().tolist()


def window_references(a: Head, group: int) -> list[float]:
    """max(2 share of the window, share of the references) of the pooled root of summed squares; see the scorer."""
    attention, shares = _attention(a), []
    decay = torch.where(a.reference, 1.0, 0.5 ** (a.age.to(a.k.dtype) / RECENCY_HALF_LIFE))
    for mine, weight in ((~a.reference, 2.0), (a.reference, 1.0)):
        norm = (attention[:, mine].square() * decay[mine]).sum(1).sqrt()
        pooled = torch.stack([norm[max(0, i - 3) : i + 4].mean() for i in range(len(norm))])
        shares.append(weight * pooled / pooled.sum())
    return torch.maximum(*shares).tolist()


def value_norm(a: Head, group: int) -> list[float]:
    """arXiv 2406.12335: mean attention of the queries that see the token, times |v|_1."""
    attention, viewers = _attention(a), a.seen.sum(1)
    return [float(attention[i].sum() / max(1, int(viewers[i])) * a.v[i].abs().sum()) for i in range(len(a.k))]


def expected_attention(a: Head, group: int) -> list[float]:
    """arXiv 2510.00636 with the window's moments: log of |v| mean_g softmax(log p + mu.k + k^T Sigma k / 2)."""
    return _expected(a, group, 0)


def expected_attention_full(a: Head, group: int) -> list[float]:
    """The same without the 4 sinks, which score above all; the queries are turned to the future already."""
    scores = _expected(a, group, 4)
    return [max(scores) + 1] * 4 + scores


def _expected(a: Head, group: int, first: int) -> list[float]:
    k, share = a.k[first:], torch.zeros(len(a.k) - first, dtype=a.k.dtype)
    for g in range(group):
        q = a.q[g::group]
        mu = q.mean(0)
        sigma = (q - mu).T @ (q - mu) / len(q)
        share += torch.softmax(a.lv[first:] + k @ mu + (k @ sigma * k).sum(1) / 2, 0) / group
    return (share * a.v[first:].norm(dim=1)).log().tolist()


def keydiff(a: Head, group: int) -> list[float]:
    """arXiv 2504.15364: minus the cosine with the mean direction of the keys."""
    unit = a.k / a.k.norm(dim=1, keepdim=True)
    anchor = unit.mean(0)
    return (-(unit @ anchor) / anchor.norm()).tolist()


def knorm(a: Head, group: int) -> list[float]:
    """arXiv 2406.11430: minus the norm of the key."""
    return (-a.k.norm(dim=1)).tolist()


def streaming_llm(a: Head, group: int) -> list[float]:
    """arXiv 2309.17453: the later, the better."""
    return [float(i) for i in range(len(a.k))]


def h2o(a: Head, group: int) -> list[float]:
    """arXiv 2306.14048: attention summed over all queries."""
    return _attention(a).sum(1).tolist()


SCORES = {
    f.__name__: f
    for f in (
        tova,
        gkv,
        window_references,
        value_norm,
        expected_attention,
        expected_attention_full,
        keydiff,
        knorm,
        streaming_llm,
        h2o,
    )
}


def score(x: Any, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[Hkv, n] scores of the method `name` for a LayerInput."""
    group = x.q.shape[1] // x.k.shape[1]
    return torch.tensor([SCORES[name](head_of(x, h, dtype), group) for h in range(x.k.shape[1])], dtype=dtype)
