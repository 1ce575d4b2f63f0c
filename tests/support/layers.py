"""Layers for the tests of what compresses them: random, of a few numbers, or read from slots; and what they give."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from keepkv_sglang.compress.layer import LayerInput, LayerResult, merge_from_assignment
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.compress.window import Window, context_log_z, observe

F64 = torch.float64


def policy(m: int, merge: str = "mean", **changes) -> SpanPolicy:
    return SpanPolicy(**{"m": m, "merge": merge, "recent": 4, "sinks": 2, "threshold": 0.6, **changes})


def random_layer(
    n=60, w=6, *, references=0, ctx=0, heads=2, group=3, dim=8, behind=0, sees_all=False, spread=1.0, shift=1.0,
    noise=0.7, topics=0, votes=2.0, dtype=F64, lv_dtype=None, device="cpu", seed: int | torch.Generator = 0,
) -> LayerInput:  # fmt: skip
    """n tokens behind ctx others; normal numbers, drawn in float64: a seed is the same layer in every dtype.

    Queries: `references` that stand behind the span, then a window of w, which ends `behind` tokens before the span
    does; sees_all: each sees the whole span. `spread` scales them, and so the logits.
    Keys: `shift` + `noise` * normal. As they are by default they share a direction, so that many cosines pass 0.6.
    topics: instead of `shift`, each is near one of so many random directions.
    Log votes: uniform in [0, votes), in lv_dtype, which is by default dtype.
    """
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    lv_ctx, lv = (torch.rand(t, heads, generator=g, dtype=F64) * votes for t in (ctx, n))
    q, k = normal(references + w, heads * group, dim) * spread, normal(n, heads, dim) * noise
    k_ctx, v = normal(ctx, heads, dim), normal(n, heads, dim)
    k = k + (normal(topics, heads, dim)[torch.randint(topics, (n,), generator=g)] if topics else shift)
    q_index = torch.cat((n + torch.arange(references), torch.arange(n - w - behind, n - behind)))
    if sees_all:
        q_index = torch.full_like(q_index, n - 1)
    x = cast(LayerInput(q, q_index, k_ctx, lv_ctx, k, v, lv, dim**-0.5), dtype, lv_dtype)
    return replace(x, **{name: t.to(device) for name, t in vars(x).items() if isinstance(t, torch.Tensor)})


def tiny(q: list, k: list, v: list, votes: list, scale=1.0, seen: list | None = None) -> LayerInput:
    """One kv head; q [w, G, D], k [n, D], v [n, D]; seen: q_index, by default all queries see all tokens."""
    q, k, v = (torch.tensor(t, dtype=F64) for t in (q, k, v))
    k, v, lv = k[:, None], v[:, None], torch.tensor(votes, dtype=F64).log()[:, None]
    q_index = torch.full((len(q),), len(k) - 1) if seen is None else torch.tensor(seen)
    return LayerInput(q, q_index, k[:0], lv[:0], k, v, lv, scale)


def in_slots(q, q_index, pools, source, context, scale) -> LayerInput:
    """The layer whose keys, values and log votes are rows of `pools`: a span in `source` behind `context`."""
    k, v, lv = pools
    return LayerInput(q, q_index, k[context], lv[context], k[source], v[source], lv[source], scale)


def looked_at_elsewhere(far: float) -> tuple[LayerInput, torch.Tensor, torch.Tensor]:
    """(layer, kept, assign): both queries want tokens 5 and 6, with e^far of the attention of all others together. 5 is
    kept alone, 6 is dropped, and the others are merged into tokens 0, 1 and 2, which nobody looks at."""
    x = random_layer(40, 2, heads=1, group=1, dim=32, sees_all=True, votes=0.0)
    q = x.q.flatten(0, 1)
    wanted = torch.linalg.pinv(q) @ torch.ones(2, dtype=F64) / x.scale  # key with logit 1 at both queries
    k = (x.k - (x.k @ q.T) @ torch.linalg.pinv(q).T).clone()  # logits 0
    k[5] = k[6] = wanted * (far + math.log(40))
    assign = (torch.arange(40) % 3)[None]
    assign[0, 5], assign[0, 6] = 3, -1
    return replace(x, k=k), torch.tensor([[0, 1, 2, 5]]), assign


# The same layer otherwise


def cast(x: LayerInput, dtype: torch.dtype, lv_dtype: torch.dtype | None = None) -> LayerInput:
    """Queries, keys and values in dtype; log votes in lv_dtype, by default dtype."""
    kinds = dict.fromkeys(("q", "k_ctx", "k", "v"), dtype) | dict.fromkeys(("lv_ctx", "lv"), lv_dtype or dtype)
    return replace(x, **{name: getattr(x, name).to(kind) for name, kind in kinds.items()})


def permuted(x: LayerInput, order: torch.Tensor) -> LayerInput:
    """Token i is token order[i] of x."""
    return replace(x, k=x.k[order], v=x.v[order], lv=x.lv[order])


def assert_same_slots(a: LayerResult, b: LayerResult, order: torch.Tensor) -> None:
    """b: the result for permuted(x, order) where a is that for x. float64; a merge rule solves small systems."""
    for h in range(a.kept.shape[0]):
        there = order[b.kept[h]]
        at = there.argsort()
        assert torch.equal(there[at], a.kept[h])
        for ours, theirs in ((a.k, b.k), (a.v, b.v), (a.lv, b.lv)):
            torch.testing.assert_close(ours[:, h], theirs[at, h], rtol=1e-7, atol=1e-7)


def window_of(x: LayerInput, block_tokens: int = 1 << 20) -> Window:
    """What torch makes of x for a scorer, all heads at once."""
    (w, q_heads, dim), heads = x.q.shape, x.k.shape[1]
    q = (x.q * x.scale).reshape(w, heads, q_heads // heads, dim).transpose(0, 1).flatten(1, 2)
    k, v, lv = x.k.transpose(0, 1).contiguous(), x.v.transpose(0, 1).contiguous(), x.lv.T.contiguous()
    return observe(q, x.q_index, k, v, lv, context_log_z(q, x.k_ctx, x.lv_ctx, block_tokens), block_tokens)


def one_cluster(x: LayerInput, rule: str):
    """Token 0 kept, all others merged into it -> k [D], v [D], votes."""
    zero = torch.zeros(1, x.k.shape[0], dtype=torch.int64)
    k, v, lv = merge_from_assignment(x, zero[:, :1], zero, rule)
    return k[0, 0], v[0, 0], float(lv[0, 0].exp())


# Attention, written out. Of one head: q [..., D], k and v [n, D], lv [n]


def log_masses(q, k, lv, scale=1.0):
    """[..., n]: log p_i exp(scale q.k_i)."""
    return q @ k.T * scale + lv


def log_mass(q, k, lv, scale=1.0):
    """[...]: of all n together."""
    return torch.logsumexp(log_masses(q, k, lv, scale), -1)


def attended(q, k, v, lv, scale=1.0):
    """[..., D]: Eq. 6."""
    return torch.softmax(log_masses(q, k, lv, scale), -1) @ v


def output(q, x: LayerInput, k, v, lv, v_ctx=None):
    """[..., D]: Eq. 6 of kv head 0, over x's context, whose values are v_ctx or 0, and slots k, v [m, Hkv, D], lv [m,
    Hkv]."""
    v_ctx = x.k_ctx * 0 if v_ctx is None else v_ctx
    keys, values, votes = (torch.cat(parts)[:, 0] for parts in ((x.k_ctx, k), (v_ctx, v), (x.lv_ctx, lv)))
    return attended(q, keys, values, votes, x.scale)
