"""Heads that keep different numbers of a span's tokens: all are scored, then those with equal numbers merged together.

scores of every head ──heads/──> counts ──select, match, rule of heads that keep alike──> k, v, lv of counts[h] slots
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch

from keepkv_sglang.compress.layer import (
    HeadView,
    LayerInput,
    LayerResult,
    Output,
    check,
    head_views,
    keep_and_merge,
    reads_outputs,
)
from keepkv_sglang.compress.scorers import get_scorer
from keepkv_sglang.compress.select import SpanPolicy, always_kept, own_cluster, select
from keepkv_sglang.compress.sums import QuerySums, Stored, query_sums
from keepkv_sglang.compress.transfer import on_device
from keepkv_sglang.kernels import choose


class Scored(NamedTuple):
    """One group of kv heads that has been scored: scores [H, n]; sums of query_sums, or None where torch computes them
    again."""

    heads: slice
    sums: QuerySums | None
    scores: torch.Tensor


def score_heads(x: LayerInput, p: SpanPolicy, scratch_bytes: int = 64 << 20) -> list[Scored]:
    """What p's scorer says of every token, as compress_layer asks it, group by group. Mutates nothing."""
    check(x, p)
    scorer, outputs, found = get_scorer(p.scorer), reads_outputs(p.merge), []
    for view in head_views(x, scratch_bytes):
        sums = query_sums(view.q, *view.stored, outputs, view.host)
        found.append(Scored(view.heads, sums, scorer(view.window(sums), p.pool_kernel)))
    return found


def merge_scored(
    x: LayerInput, p: SpanPolicy, scored: Sequence[Scored], counts: Sequence[int], scratch_bytes: int = 64 << 20
) -> list[LayerResult]:
    """As compress_layer, but kv head h keeps counts[h] slots: one result per head, of that head alone.

    Each head keeps the same recent tokens, those that p.m slots would (select.left_raw), and of the others its own.
    x: as it was scored; without its context where all of `scored` have sums.
    """
    jobs: list[Callable[[], list[LayerResult]]] = []
    order: list[int] = []
    for view, group in zip(head_views(x, scratch_bytes), scored, strict=True):
        assert view.heads == group.heads
        for count, at in _alike(counts[view.heads]).items():
            jobs.append(_job(x, p, view, group, at, count, scratch_bytes))
            order += [view.heads.start + i for i in at]
    found = dict(zip(order, chain.from_iterable(_run(jobs, x.k)), strict=True))
    return [found[h] for h in range(x.k.shape[1])]


def _alike(counts: Sequence[int]) -> dict[int, list[int]]:
    """Heads that keep equally many tokens, which are merged together: count -> heads, ascending."""
    found: dict[int, list[int]] = {}
    for head, count in enumerate(counts):
        found.setdefault(count, []).append(head)
    return found


def _job(
    x: LayerInput, p: SpanPolicy, view: HeadView, group: Scored, at: list[int], count: int, scratch_bytes: int
) -> Callable[[], list[LayerResult]]:
    def job() -> list[LayerResult]:
        some, recent = _heads(x, [view.heads.start + i for i in at]), always_kept(p)[1]
        policy = replace(p, m=count, recent=recent, carried=recent)
        if count == x.k.shape[0]:
            result = _whole(some, policy)
        else:
            result = _merge(some, policy, *_some(view, group, at), scratch_bytes)
        values = (part.split(1, 1) for part in (result.k, result.v, result.lv))
        parts = (result.kept.split(1), result.assign.split(1), *values)
        return [LayerResult(*of_head) for of_head in zip(*parts, strict=True)]

    return job


def _merge(x: LayerInput, p: SpanPolicy, view: HeadView, scored: Scored, scratch_bytes: int) -> LayerResult:
    """compress_layer of heads that have been scored."""
    out = Output.empty(x, p.m)
    keep_and_merge(x, view, view.window(scored.sums), scored.scores, p, scratch_bytes, out)
    return LayerResult(out.kept, out.assign, out.k, out.v, out.lv)


def _whole(x: LayerInput, p: SpanPolicy) -> LayerResult:
    """Heads that keep every token, in the order of select()."""
    n, heads = x.k.shape[:2]
    kept = select(x.k.new_zeros(1, n), p)[0].expand(heads, n)
    order = kept[0]
    return LayerResult(kept, own_cluster(kept, n), x.k[order], x.v[order], x.lv[order])


def _some(view: HeadView, scored: Scored, at: list[int]) -> tuple[HeadView, Scored]:
    """These heads of a group."""
    position, *stored = view.stored
    sums = scored.sums
    if sums is not None:
        sums = QuerySums(*(None if part is None else _take(part, at, 0) for part in sums))  # type: ignore[arg-type]
    k, v, lv, q = (_take(part, at, 0) for part in (view.k, view.v, view.lv, view.q))
    there = Stored(position, *(_take(part, at, 1) for part in stored))
    heads = slice(0, len(at))
    return replace(view, heads=heads, k=k, v=v, lv=lv, q=q, stored=there), Scored(
        heads, sums, _take(scored.scores, at, 0)
    )


def _heads(x: LayerInput, at: list[int]) -> LayerInput:
    group = x.q.shape[1] // x.k.shape[1]
    q = _take(x.q, [h * group + g for h in at for g in range(group)], 1)
    k_ctx, lv_ctx, k, v, lv = (_take(part, at, 1) for part in (x.k_ctx, x.lv_ctx, x.k, x.v, x.lv))
    return replace(x, q=q, k_ctx=k_ctx, lv_ctx=lv_ctx, k=k, v=v, lv=lv)


def _take(part: torch.Tensor, at: list[int], dim: int) -> torch.Tensor:
    """Heads `at`, ascending: a view where they lie side by side, else a copy that lies head by head."""
    if at[-1] - at[0] == len(at) - 1:
        return part.narrow(dim, at[0], len(at))
    index = on_device(torch.tensor(at), part.device)
    return part.transpose(0, dim).index_select(0, index).transpose(0, dim)


def _run(jobs: Sequence[Callable[[], list[LayerResult]]], like: torch.Tensor) -> list[list[LayerResult]]:
    """On a CPU with the C++ kernels one job per thread, each of which computes alone: heads are too small to share."""
    kernel = choose.implementation("merge", like) if like.is_cpu else None
    compute_alone = getattr(kernel, "compute_alone", None)
    threads = torch.get_num_threads() if compute_alone is not None else 1
    if threads == 1 or len(jobs) == 1:
        return [job() for job in jobs]
    inference = torch.is_inference_mode_enabled()  # of a thread, like the number of its threads

    def alone(job: Callable[[], list[LayerResult]]) -> list[LayerResult]:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            return job()

    return list(_pool(threads, compute_alone).map(alone, jobs))


@cache
def _pool(threads: int, alone: Callable[[], None]) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "keepkv-heads", initializer=alone)
