"""One layer: score -> select -> match -> merge. All kv heads batched; knows nothing of SGLang or of KV pools.

window queries, keys, log votes ──observe──> Window ──scorer──> scores [H, n]
scores ──select──> kept [H, m], absorbs [H, m] ──match──> assign [H, n] ──rule──> k, v, lv of m slots
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keepkv_sglang.kernels.merge.torch_impl import Segments, nearest_kept
from keepkv_sglang.merging import get_rule
from keepkv_sglang.merging.base import Clusters
from keepkv_sglang.policies import MERGE_RULES, SCORERS
from keepkv_sglang.scoring import get_scorer
from keepkv_sglang.scoring.base import Window, context_log_z, observe


@dataclass(frozen=True)
class LayerInput:
    """One layer of one request.

    q [w, Hq, D]: window queries after RoPE, NOT scaled; q_index [w] int64: index in the span of each query's
    token (query j sees span tokens <= q_index[j] and all of the context). w is 0 for a span that is
    compressed with no queries at hand, as under memory pressure: q [0, Hq, D], q_index [0]; the policy then
    names a scorer and a rule that need none (policies.py). k_ctx [c, Hkv, D], lv_ctx [c,
    Hkv]: everything before the span, c may be 0; used for softmax normalisation only. k, v [n, Hkv, D] and
    lv [n, Hkv] (log votes): the span to compress. scale: softmax scale. q head h reads kv head h // (Hq /
    Hkv). Storage may be bfloat16, float16, float32 or float64; arithmetic is float32, or float64 when k is
    float64.
    """

    q: torch.Tensor
    q_index: torch.Tensor
    k_ctx: torch.Tensor
    lv_ctx: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    scale: float


@dataclass(frozen=True)
class SpanPolicy:
    """How a span of n tokens becomes m slots. `merge`, `scorer`: names as policies.py resolves them.

    recent: last tokens always kept (at most m // 2); sinks: first tokens always kept (0 unless the span
    starts at logical position 0). Both, and the ceil(strong_fraction * m) highest-scored kept tokens, never
    absorb others. threshold: cosine similarity of keys above which a dropped token joins a kept one.
    pool_kernel: odd. chunk: tokens that are kept or not together (ChunkKV); 1: each on its own.
    """

    m: int
    merge: str
    recent: int
    sinks: int
    threshold: float
    pool_kernel: int = 7
    strong_fraction: float = 0.1
    scorer: str = "snapkv"
    chunk: int = 1


@dataclass(frozen=True)
class LayerResult:
    """kept [Hkv, m] int64: span indices, ascending. assign [Hkv, n] int64: cluster 0..m-1 of each token, -1
    dropped; a kept token is in its own cluster. k, v [m, Hkv, D] in the dtype of the input; lv [m, Hkv] in
    the dtype of x.lv."""

    kept: torch.Tensor
    assign: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor


def compress_layer(x: LayerInput, p: SpanPolicy, scratch_bytes: int = 64 << 20) -> LayerResult:
    """Compresses one layer's span to p.m slots. Mutates nothing; ValueError for an impossible policy.

    `scratch_bytes` bounds what holds window logits [heads, Q, tokens], Q = w * Hq / Hkv: kv heads are
    processed in groups, and a context, or a span too long for one head at a time, in blocks of tokens. On
    top come float copies of the group's keys and values and a few [heads, m, Q] tensors. Grouping changes
    results by rounding only.
    """
    _check(x, p)
    scorer, matching = get_scorer(p.scorer), p.merge != "evict"
    out = _Output.empty(x, p.m)
    for heads in _head_groups(x, scratch_bytes):
        view = _HeadView.of(x, heads)
        window = view.observe(x, heads, scratch_bytes)
        kept, absorbs = select(scorer(window, p.pool_kernel), p)
        assign = _own_cluster(kept, view.k.shape[1])
        if matching:
            assign = match(view.k, kept, absorbs, assign, p, scratch_bytes)
        _merge_heads(x, heads, view, window, kept, assign, p.merge, True, out)
    return LayerResult(out.kept, out.assign, out.k, out.v, out.lv)


def merge_from_assignment(
    x: LayerInput,
    kept: torch.Tensor,
    assign: torch.Tensor,
    rule: str,
    guard: bool = False,
    scratch_bytes: int = 64 << 20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merges with a recorded selection: kept [Hkv, m], assign [Hkv, n] -> k, v [m, Hkv, D], lv [m, Hkv].

    ValueError for a rule that needs queries when x has none.
    A recorded assignment is what came out of the guards: they are off by default, so rounding flips none.
    """
    _check_queries(x, rule)
    out = _Output.empty(x, kept.shape[1])
    for heads in _head_groups(x, scratch_bytes):
        view = _HeadView.of(x, heads)
        window = view.observe(x, heads, scratch_bytes)
        _merge_heads(x, heads, view, window, kept[heads], assign[heads], rule, guard, out)
    return out.k, out.v, out.lv


def select(scores: torch.Tensor, p: SpanPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [H, n] -> kept [H, m] int64 ascending, absorbs [H, m] bool; False: never rewritten.

    Sinks and recent first, then by score; equal scores: the lower index. Sinks, recent and the strongest
    kept tokens are protected. With p.chunk > 1 whole chunks are taken, best mean score first (`chunk_scores`);
    of the chunk that no longer fits, the first tokens.
    """
    n = scores.shape[1]
    sinks, recent = _always_kept(p)
    forced = chunk_scores(scores, p.chunk) if p.chunk > 1 else scores.clone()
    forced[:, :sinks] = torch.inf
    forced[:, n - recent :] = torch.inf
    kept = torch.sort(forced, dim=1, descending=True, stable=True).indices[:, : p.m].sort(dim=1).values
    strongest = torch.sort(scores.gather(1, kept), dim=1, descending=True, stable=True).indices
    absorbs = (kept >= sinks) & (kept < n - recent)
    return kept, absorbs.scatter(1, strongest[:, : _strong(p)], False)


def chunk_scores(scores: torch.Tensor, chunk: int) -> torch.Tensor:
    """[H, n]: each token's score replaced by the mean over its chunk, tokens [c * chunk, (c + 1) * chunk) of the span
    (ChunkKV, arXiv 2502.00299); tokens that no query sees (-inf) do not count, unless no other is there.

    Differs from the paper: a mean where it sums, so that a shorter last chunk is not at a disadvantage; m is met
    exactly; sinks and recent are kept by token; each kv head chooses its own chunks, and layers do not reuse
    another layer's choice.
    """
    heads, n = scores.shape
    grouped = F.pad(scores, (0, -n % chunk), value=-torch.inf).view(heads, -1, chunk)
    counted = grouped > -torch.inf
    mean = torch.where(counted, grouped, 0.0).sum(dim=2) / counted.sum(dim=2)  # nothing counted: NaN, replaced here
    return mean.masked_fill(~counted.any(dim=2), -torch.inf).repeat_interleave(chunk, dim=1)[:, :n]


def match(
    k: torch.Tensor,
    kept: torch.Tensor,
    absorbs: torch.Tensor,
    assign: torch.Tensor,
    p: SpanPolicy,
    scratch_bytes: int,
) -> torch.Tensor:
    """Each dropped token joins the absorbing kept token with the highest cosine similarity of keys, if above
    p.threshold (KeepKV, candidates). k [H, n, D]; returns a new assign [H, n]."""
    n = assign.shape[1]
    # The same number of tokens is dropped in every head, so this is a rectangle.
    dropped = torch.sort((assign >= 0).to(torch.int8), dim=1, stable=True).indices[:, : n - p.m]
    # Absorbing tokens to the front. Their number differs by head; this bound on it needs no look at the data.
    bound = p.m - max(_strong(p), sum(_always_kept(p)))
    front = torch.sort(absorbs.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :bound]
    if bound == 0:
        return assign
    targets, allowed = kept.gather(1, front), absorbs.gather(1, front)
    similarity, column = nearest_kept(k, dropped, targets, allowed, scratch_bytes)
    joined = torch.where(similarity > p.threshold, front.gather(1, column), -1)
    return assign.scatter(1, dropped, joined)


def _always_kept(p: SpanPolicy) -> tuple[int, int]:
    recent = min(p.recent, p.m // 2)
    return min(p.sinks, p.m - recent), recent


def _strong(p: SpanPolicy) -> int:
    return min(p.m, math.ceil(round(p.strong_fraction * p.m, 9)))  # 0.1 * 70 is 7.000000000000001


def _own_cluster(kept: torch.Tensor, n: int) -> torch.Tensor:
    number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.full((kept.shape[0], n), -1, dtype=torch.int64, device=kept.device).scatter_(1, kept, number)


@dataclass(frozen=True)
class _Output:
    """Results of all heads in storage layout; each head group fills its slice."""

    kept: torch.Tensor
    assign: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor

    @staticmethod
    def empty(x: LayerInput, m: int) -> _Output:
        n, heads, dim = x.k.shape
        return _Output(
            torch.empty(heads, m, dtype=torch.int64, device=x.k.device),
            torch.empty(heads, n, dtype=torch.int64, device=x.k.device),
            x.k.new_empty(m, heads, dim),
            x.v.new_empty(m, heads, x.v.shape[2]),
            x.lv.new_empty(m, heads),
        )


@dataclass(frozen=True)
class _HeadView:
    """One group of kv heads, head-major, compute dtype: k, v [H, n, D], lv [H, n], q [H, w * G, D] scaled."""

    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    q: torch.Tensor

    @staticmethod
    def of(x: LayerInput, heads: slice) -> _HeadView:
        dtype = torch.float64 if x.k.dtype == torch.float64 else torch.float32
        w, q_heads, dim = x.q.shape
        group = q_heads // x.k.shape[1]
        q = x.q.reshape(w, x.k.shape[1], group, dim)[:, heads].permute(1, 0, 2, 3)
        return _HeadView(
            x.k[:, heads].to(dtype).transpose(0, 1).contiguous(),
            x.v[:, heads].to(dtype).transpose(0, 1).contiguous(),
            x.lv[:, heads].to(dtype).T.contiguous(),
            q.to(dtype).reshape(q.shape[0], w * group, dim) * x.scale,
        )

    def observe(self, x: LayerInput, heads: slice, scratch_bytes: int) -> Window:
        per_token = 2 * self.q.shape[0] * self.q.shape[1] * self.q.element_size()
        block = max(1, scratch_bytes // max(1, per_token))
        log_z_ctx = context_log_z(self.q, x.k_ctx[:, heads], x.lv_ctx[:, heads], block)
        return observe(self.q, x.q_index.to(self.q.device), self.k, self.v, self.lv, log_z_ctx, block)


def _head_groups(x: LayerInput, scratch_bytes: int) -> list[slice]:
    n, heads, _ = x.k.shape
    queries = x.q.shape[0] * x.q.shape[1] // heads
    size = 8 if x.k.dtype == torch.float64 else 4
    step = max(1, min(heads, scratch_bytes // (2 * n * max(1, queries) * size)))
    return [slice(h, min(h + step, heads)) for h in range(0, heads, step)]


def _merge_heads(
    x: LayerInput,
    heads: slice,
    view: _HeadView,
    window: Window,
    kept: torch.Tensor,
    assign: torch.Tensor,
    rule: str,
    guard: bool,
    out: _Output,
) -> None:
    """Writes one head group into `out`. A cluster that is not merged keeps key, value, votes bit for bit, unless the
    rule rewrites all of them."""
    groups, m = kept.shape
    n = assign.shape[1]
    rows = (kept + torch.arange(groups, device=kept.device)[:, None] * n).flatten()
    # Storage -> compute dtype -> storage is exact, and rows of the head-major copy are cheap to take.
    k = view.k.flatten(0, 1).index_select(0, rows).to(x.k.dtype).view(groups, m, -1)
    v = view.v.flatten(0, 1).index_select(0, rows).to(x.v.dtype).view(groups, m, -1)
    lv = x.lv[:, heads].gather(0, kept.T).T
    if rule != "evict":
        seg = Segments.from_assignment(assign, m)
        merged = get_rule(rule)(Clusters(view.k, view.v, view.lv, assign, window, seg))
        rk, rv, rlv = merged.k.to(k.dtype), merged.v.to(v.dtype), merged.lv.to(lv.dtype)
        # amax and the comparison also catch NaN, and are 10 times faster than isfinite().all() here
        good = (rlv.abs() < torch.inf) & (rk.abs().amax(dim=2) < torch.inf) & (rv.abs().amax(dim=2) < torch.inf)
        if guard and merged.accepted is not None:
            good &= merged.accepted
        many = seg.counts.view(groups, m) > 1
        use = good if merged.rewrites_all else many & good
        k, v = torch.where(use[..., None], rk, k), torch.where(use[..., None], rv, v)
        lv = torch.where(use, rlv, lv)
        refused = (many & ~good).gather(1, assign.clamp(min=0)) & (assign >= 0)
        assign = torch.where(refused, _own_cluster(kept, n), assign)
    out.kept[heads], out.assign[heads] = kept, assign
    out.k[:, heads], out.v[:, heads], out.lv[:, heads] = k.transpose(0, 1), v.transpose(0, 1), lv.T


def _check(x: LayerInput, p: SpanPolicy) -> None:
    n = x.k.shape[0]
    if not 1 <= p.m < n:
        raise ValueError(f"cannot keep {p.m} of {n} tokens: m must be at least 1 and below the span's length")
    if p.pool_kernel < 1 or p.pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel {p.pool_kernel} must be odd and positive")
    if p.chunk < 1:
        raise ValueError(f"chunk {p.chunk} must be at least 1")
    if not 0.0 <= p.strong_fraction <= 1.0 or p.recent < 0 or p.sinks < 0:
        raise ValueError("strong_fraction must lie in [0, 1]; recent and sinks must not be negative")
    if x.q.shape[1] < 1 or x.q.shape[1] % x.k.shape[1] != 0:
        raise ValueError(
            f"window queries of {x.q.shape[1]} heads over {x.k.shape[1]} kv heads:"
            " a whole number of query heads per kv head"
        )
    get_rule(p.merge)
    get_scorer(p.scorer)
    if x.q.shape[0] == 0 and SCORERS.needs_queries(p.scorer):
        raise ValueError(
            f"scorer {p.scorer!r} needs window queries and there are none:"
            f" use one of {', '.join(sorted(SCORERS.query_free))}"
        )
    _check_queries(x, p.merge)


def _check_queries(x: LayerInput, rule: str) -> None:
    if x.q.shape[0] == 0 and MERGE_RULES.needs_queries(rule):
        raise ValueError(
            f"merge rule {rule!r} needs window queries and there are none:"
            f" use one of {', '.join(sorted(MERGE_RULES.query_free))}"
        )
