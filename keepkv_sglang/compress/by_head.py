"""Heads that keep different numbers of a span's tokens: all are scored first, then each is merged on its own.

scores of every head ──heads/──> counts ──select, match, rule of one head──> k, v, lv of counts[h] slots
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
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
    x: as it was scored; without its context where all of `scored` have sums. On a GPU heads that keep equally many are
    merged at once: its time is starting operations.
    """
    jobs: list[Callable[[], LayerResult]] = []
    members: list[list[int]] = []
    for view, group in zip(head_views(x, scratch_bytes), scored, strict=True):
        assert view.heads == group.heads
        for heads in _together(view.heads, counts, x.k):
            jobs.append(_job(x, p, view, group, heads, counts[heads[0]], scratch_bytes))
            members.append(heads)
    found: dict[int, LayerResult] = {}
    for heads, result in zip(members, _run(jobs, x.k), strict=True):
        found |= {h: _part(result, slice(at, at + 1)) for at, h in enumerate(heads)}
    return [found[h] for h in range(len(found))]


def _together(heads: slice, counts: Sequence[int], like: torch.Tensor) -> list[list[int]]:
    """Which of a group's heads are one job: on a CPU each."""
    every = range(heads.start, heads.stop)
    if like.is_cpu and not choose.interpreted():
        return [[h] for h in every]
    by_count: dict[int, list[int]] = {}
    for h in every:
        by_count.setdefault(counts[h], []).append(h)
    return list(by_count.values())


def _job(
    x: LayerInput, p: SpanPolicy, view: HeadView, group: Scored, heads: list[int], count: int, scratch_bytes: int
) -> Callable[[], LayerResult]:
    def job() -> LayerResult:
        some, recent = _heads(x, heads), always_kept(p)[1]
        policy = replace(p, m=count, recent=recent, carried=recent)
        if count == x.k.shape[0]:
            return _whole(some, policy)
        return _merge(some, policy, *_some(view, group, [h - view.heads.start for h in heads]), scratch_bytes)

    return job


def _merge(x: LayerInput, p: SpanPolicy, view: HeadView, scored: Scored, scratch_bytes: int) -> LayerResult:
    """compress_layer of heads that have been scored."""
    out = Output.empty(x, p.m)
    keep_and_merge(x, view, view.window(scored.sums), scored.scores, p, scratch_bytes, out)
    return LayerResult(out.kept, out.assign, out.k, out.v, out.lv)


def _whole(x: LayerInput, p: SpanPolicy) -> LayerResult:
    """Heads that keep every token, in the order of select()."""
    n, heads = x.k.shape[:2]
    kept = select(x.k.new_zeros(heads, n), p)[0]
    order = kept[0]
    return LayerResult(kept, own_cluster(kept, n), x.k[order], x.v[order], x.lv[order])


def _part(result: LayerResult, h: slice) -> LayerResult:
    return LayerResult(result.kept[h], result.assign[h], result.k[:, h], result.v[:, h], result.lv[:, h])


def _take(x: torch.Tensor, dim: int, heads: list[int]) -> torch.Tensor:
    """Some heads of x: of a single one a view."""
    if len(heads) == 1:
        return x.narrow(dim, heads[0], 1)
    return x.index_select(dim, on_device(torch.tensor(heads), x.device))


def _some(view: HeadView, scored: Scored, heads: list[int]) -> tuple[HeadView, Scored]:
    """Heads of a group, numbered from its first."""
    position, *stored = view.stored
    sums, all_ = scored.sums, slice(0, len(heads))
    if sums is not None:
        sums = QuerySums(*(None if part is None else _take(part, 0, heads) for part in sums))  # type: ignore[arg-type]
    some = replace(
        view,
        heads=all_,
        k=_take(view.k, 0, heads),
        v=_take(view.v, 0, heads),
        lv=_take(view.lv, 0, heads),
        q=_take(view.q, 0, heads),
        stored=Stored(position, *(_take(part, 1, heads) for part in stored)),
    )
    return some, Scored(all_, sums, _take(scored.scores, 0, heads))


def _heads(x: LayerInput, heads: list[int]) -> LayerInput:
    q = _take(x.q.unflatten(1, (x.k.shape[1], -1)), 1, heads).flatten(1, 2)
    k_ctx, lv_ctx, k, v, lv = (_take(part, 1, heads) for part in (x.k_ctx, x.lv_ctx, x.k, x.v, x.lv))
    return replace(x, q=q, k_ctx=k_ctx, lv_ctx=lv_ctx, k=k, v=v, lv=lv)


def _run(jobs: Sequence[Callable[[], LayerResult]], like: torch.Tensor) -> list[LayerResult]:
    """On a CPU with the C++ kernels one head per thread, each of which computes alone: heads are too small to share."""
    kernel = choose.implementation("merge", like) if like.is_cpu else None
    compute_alone = getattr(kernel, "compute_alone", None)
    threads = torch.get_num_threads() if compute_alone is not None else 1
    if threads == 1 or len(jobs) == 1:
        return [job() for job in jobs]
    inference = torch.is_inference_mode_enabled()  # of a thread, like the number of its threads

    def alone(job: Callable[[], LayerResult]) -> LayerResult:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            return job()

    return list(_pool(threads, compute_alone).map(alone, jobs))


@cache
def _pool(threads: int, alone: Callable[[], None]) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "keepkv-heads", initializer=alone)
