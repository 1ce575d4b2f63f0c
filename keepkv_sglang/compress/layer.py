"""One layer: score -> select -> match -> merge. All kv heads batched; knows nothing of SGLang or of KV pools.

window queries, keys, log votes ──observe──> Window ──scorer──> scores [H, n]
scores ──select──> kept [H, m], absorbs [H, m] ──match──> assign [H, n] ──rule──> k, v, lv of m slots
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from keepkv_sglang.compress.registry import MERGE_RULES, SCORERS
from keepkv_sglang.compress.rules import get_rule
from keepkv_sglang.compress.rules.base import Clusters
from keepkv_sglang.compress.scorers import get_scorer
from keepkv_sglang.compress.select import SpanPolicy, check_ranges, match, own_cluster, select
from keepkv_sglang.compress.sums import QuerySums, Stored, query_sums
from keepkv_sglang.compress.transfer import on_device
from keepkv_sglang.compress.window import Window, context_log_z, observe
from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.merge.torch_impl import Segments


@dataclass(frozen=True)
class LayerInput:
    """One layer of one request.

    q [w, Hq, D]: window queries after RoPE, NOT scaled; q_index [w] int64: index in the span of each query's
    token (query j sees span tokens <= q_index[j] and all of the context); on the CPU, whatever the others are on: the
    host wants to know it, and would have to wait for a GPU. w is 0 for a span that is
    compressed with no queries at hand, as under memory pressure: q [0, Hq, D], q_index [0]; the policy then
    names a scorer and a rule that need none (registry.py). k_ctx [c, Hkv, D], lv_ctx [c,
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
class LayerResult:
    """kept [Hkv, m] int64: span indices, those of p.whole first, then the others, each ascending. assign [Hkv, n]
    int64: cluster 0..m-1 of each token, -1 dropped; a kept token is in its own cluster. k, v [m, Hkv, D] in the
    dtype of the input; lv [m, Hkv] in the dtype of x.lv."""

    kept: torch.Tensor
    assign: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor


def compress_layer(x: LayerInput, p: SpanPolicy, scratch_bytes: int = 64 << 20) -> LayerResult:
    """Compresses one layer's span to p.m slots. Mutates nothing; ValueError for an impossible policy.

    `scratch_bytes` bounds what holds window logits [heads, Q, tokens], Q = w * Hq / Hkv: kv heads are
    processed in groups (at least heads_at_once), and a context, or a span too long for one head at a time, in blocks of
    tokens. On top come float copies of the group's keys and values; of a rule that fits values to the queries a few
    times rules/ridge.HELD_BYTES, or 256 slots of one head by the queries if that is more; of the C++ the logits of 64
    queries per thread. Grouping changes results by rounding only.
    """
    check(x, p)
    scorer, outputs = get_scorer(p.scorer), reads_outputs(p.merge)
    out = Output.empty(x, p.m)
    for view in head_views(x, scratch_bytes):
        window = view.window(query_sums(view.q, *view.stored, outputs, view.host))
        keep_and_merge(x, view, window, scorer(window, p.pool_kernel), p, scratch_bytes, out)
    return LayerResult(out.kept, out.assign, out.k, out.v, out.lv)


def keep_and_merge(
    x: LayerInput, view: HeadView, window: Window, scores: torch.Tensor, p: SpanPolicy, scratch_bytes: int, out: Output
) -> None:
    """One head group that has been scored, scores [H, n]: select, match, merge into `out`."""
    kept, absorbs = select(scores, p)
    assign = own_cluster(kept, view.k.shape[1])
    if p.merge != "evict":
        assign = match(view.k, kept, absorbs, assign, p, scratch_bytes, view.stored.k.transpose(0, 1))
    _merge_heads(x, view, window, kept, assign, p.merge, True, p.whole_tokens, out)


def merge_from_assignment(
    x: LayerInput,
    kept: torch.Tensor,
    assign: torch.Tensor,
    rule: str,
    guard: bool = False,
    scratch_bytes: int = 64 << 20,
    fixed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merges with a recorded selection: kept [Hkv, m], assign [Hkv, n] -> k, v [m, Hkv, D], lv [m, Hkv].

    fixed: the first so many of `kept` are not rewritten by any rule (SpanPolicy.whole).
    ValueError for a rule that needs queries when x has none.
    A recorded assignment is what came out of the guards: they are off by default, so rounding flips none.
    """
    _check_queries(x, rule)
    out = Output.empty(x, kept.shape[1])
    for view in head_views(x, scratch_bytes):
        window = view.window(query_sums(view.q, *view.stored, reads_outputs(rule), view.host))
        _merge_heads(x, view, window, kept[view.heads], assign[view.heads], rule, guard, fixed, out)
    return out.k, out.v, out.lv


@dataclass(frozen=True)
class Output:
    """Results of all heads in storage layout; each head group fills its slice."""

    kept: torch.Tensor
    assign: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor

    @staticmethod
    def empty(x: LayerInput, m: int) -> Output:
        n, heads, dim = x.k.shape
        return Output(
            torch.empty(heads, m, dtype=torch.int64, device=x.k.device),
            torch.empty(heads, n, dtype=torch.int64, device=x.k.device),
            x.k.new_empty(m, heads, dim),
            x.v.new_empty(m, heads, x.v.shape[2]),
            x.lv.new_empty(m, heads),
        )


@dataclass(frozen=True)
class HeadView:
    """One group of kv heads, head-major, compute dtype: k, v [H, n, D], lv [H, n], q [H, w * G, D] scaled.

    heads: which of the layer's. stored: what query_sums reads, as it lies in the pool. block: for so many tokens the
    logits of all queries fit the scratch memory. host: as Window has it.
    """

    heads: slice
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    q: torch.Tensor
    stored: Stored
    block: int
    host: list[int] | None

    @staticmethod
    def of(x: LayerInput, heads: slice, scratch_bytes: int) -> HeadView:
        dtype = torch.float64 if x.k.dtype == torch.float64 else torch.float32
        w, q_heads, dim = x.q.shape
        group = q_heads // x.k.shape[1]
        q = x.q.reshape(w, x.k.shape[1], group, dim)[:, heads].permute(1, 0, 2, 3)
        q = q.to(dtype).reshape(q.shape[0], w * group, dim) * x.scale
        stored = Stored(on_device(x.q_index, q.device), *(t[:, heads] for t in (x.k_ctx, x.lv_ctx, x.k, x.v, x.lv)))
        return HeadView(
            heads,
            stored.k.to(dtype).transpose(0, 1).contiguous(),
            stored.v.to(dtype).transpose(0, 1).contiguous(),
            stored.lv.to(dtype).T.contiguous(),
            q,
            stored,
            max(1, scratch_bytes // max(1, 2 * q.shape[0] * q.shape[1] * q.element_size())),
            x.q_index.tolist() if x.q_index.is_cpu else None,
        )

    def window(self, sums: QuerySums | None) -> Window:
        """What the queries see of the span. sums: of query_sums; None: torch computes what they would say."""
        k, v, lv, q, (position, k_ctx, lv_ctx, *_) = self.k, self.v, self.lv, self.q, self.stored
        if sums is not None:
            return Window(q, k, v, lv, position, sums.log_z, sums.log_z_ctx, self.block, None, sums, self.host)
        return observe(q, position, k, v, lv, context_log_z(q, k_ctx, lv_ctx, self.block), self.block, self.host)


def head_views(x: LayerInput, scratch_bytes: int = 64 << 20) -> Iterator[HeadView]:
    """kv heads in groups that fit the scratch memory."""
    for heads in _head_groups(x, scratch_bytes, heads_at_once(x.k)):
        yield HeadView.of(x, heads, scratch_bytes)


def gpu_kernel_scores(k: torch.Tensor) -> bool:
    """Then nothing holds window logits, and all heads go together."""
    return not k.is_cpu and choose.implementation("score", k) is not None


def heads_at_once(k: torch.Tensor) -> int:
    """The least number of kv heads of k [n, Hkv, D] to take together, whatever their logits would need."""
    if k.is_cpu:
        return torch.get_num_threads()  # the CPU kernels hold them for 64 queries at a time, one head per thread
    return k.shape[1] if gpu_kernel_scores(k) else 1


def reads_outputs(rule: str) -> bool:
    """Whether a rule asks for the queries' attention outputs."""
    return getattr(get_rule(rule), "reads_outputs", False)


def _head_groups(x: LayerInput, scratch_bytes: int, least: int) -> list[slice]:
    n, heads, _ = x.k.shape
    queries = x.q.shape[0] * x.q.shape[1] // heads
    size = 8 if x.k.dtype == torch.float64 else 4
    step = max(least, min(heads, scratch_bytes // (2 * n * max(1, queries) * size)))
    return [slice(h, min(h + step, heads)) for h in range(0, heads, step)]


def _merge_heads(
    x: LayerInput,
    view: HeadView,
    window: Window,
    kept: torch.Tensor,
    assign: torch.Tensor,
    rule: str,
    guard: bool,
    fixed: int,
    out: Output,
) -> None:
    """Writes one head group into `out`. A cluster that is not merged keeps key, value, votes bit for bit, unless the
    rule rewrites all of them; even then the first `fixed` do."""
    groups, m = kept.shape
    n, heads = assign.shape[1], view.heads
    rows = (kept + torch.arange(groups, device=kept.device)[:, None] * n).flatten()
    # Storage -> compute dtype -> storage is exact, and rows of the head-major copy are cheap to take.
    k = view.k.flatten(0, 1).index_select(0, rows).to(x.k.dtype).view(groups, m, -1)
    v = view.v.flatten(0, 1).index_select(0, rows).to(x.v.dtype).view(groups, m, -1)
    lv = x.lv[:, heads].gather(0, kept.T).T
    if rule != "evict":
        seg = Segments.from_assignment(assign, m)
        merged = get_rule(rule)(Clusters(view.k, view.v, view.lv, assign, window, seg, fixed))
        rk, rv, rlv = merged.k.to(k.dtype), merged.v.to(v.dtype), merged.lv.to(lv.dtype)
        # amax and the comparison also catch NaN, and are 10 times faster than isfinite().all() here
        good = (rlv.abs() < torch.inf) & (rk.abs().amax(dim=2) < torch.inf) & (rv.abs().amax(dim=2) < torch.inf)
        if guard and merged.accepted is not None:
            good &= merged.accepted
        many = seg.counts.view(groups, m) > 1
        use = good if merged.rewrites_all else many & good
        use[:, :fixed] = False
        k, v = torch.where(use[..., None], rk, k), torch.where(use[..., None], rv, v)
        lv = torch.where(use, rlv, lv)
        refused = (many & ~good).gather(1, assign.clamp(min=0)) & (assign >= 0)
        assign = torch.where(refused, own_cluster(kept, n), assign)
    out.kept[heads], out.assign[heads] = kept, assign
    out.k[:, heads], out.v[:, heads], out.lv[:, heads] = k.transpose(0, 1), v.transpose(0, 1), lv.T


def check(x: LayerInput, p: SpanPolicy) -> None:
    """ValueError for an impossible policy."""
    n = x.k.shape[0]
    if not 1 <= p.m < n:
        raise ValueError(f"cannot keep {p.m} of {n} tokens: m must be at least 1 and below the span's length")
    check_ranges(p, n)
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
