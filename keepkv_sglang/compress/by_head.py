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
    jobs: list[Callable[[], LayerResult]] = []
    for view, group in zip(head_views(x, scratch_bytes), scored, strict=True):
        assert view.heads == group.heads
        for at, h in enumerate(range(view.heads.start, view.heads.stop)):
            jobs.append(_job(x, p, view, group, at, h, counts[h], scratch_bytes))
    return _run(jobs, x.k)


def _job(
    x: LayerInput, p: SpanPolicy, view: HeadView, group: Scored, at: int, h: int, count: int, scratch_bytes: int
) -> Callable[[], LayerResult]:
    def job() -> LayerResult:
        head, recent = _head(x, h), always_kept(p)[1]
        policy = replace(p, m=count, recent=recent, carried=recent)
        if count == x.k.shape[0]:
            return _whole(head, policy)
        return _merge(head, policy, *_one(view, group, at), scratch_bytes)

    return job


def _merge(head: LayerInput, p: SpanPolicy, view: HeadView, scored: Scored, scratch_bytes: int) -> LayerResult:
    """compress_layer of one head that has been scored."""
    out = Output.empty(head, p.m)
    keep_and_merge(head, view, view.window(scored.sums), scored.scores, p, scratch_bytes, out)
    return LayerResult(out.kept, out.assign, out.k, out.v, out.lv)


def _whole(x: LayerInput, p: SpanPolicy) -> LayerResult:
    """A head that keeps every token, in the order of select()."""
    n = x.k.shape[0]
    kept = select(x.k.new_zeros(1, n), p)[0]
    order = kept[0]
    return LayerResult(kept, own_cluster(kept, n), x.k[order], x.v[order], x.lv[order])


def _one(view: HeadView, scored: Scored, at: int) -> tuple[HeadView, Scored]:
    """Head `at` of a group."""
    h = slice(at, at + 1)
    position, *stored = view.stored
    sums = scored.sums
    if sums is not None:
        sums = QuerySums(*(None if part is None else part[h] for part in sums))  # type: ignore[arg-type]
    one = replace(
        view,
        heads=slice(0, 1),
        k=view.k[h],
        v=view.v[h],
        lv=view.lv[h],
        q=view.q[h],
        stored=Stored(position, *(part[:, h] for part in stored)),
    )
    return one, Scored(slice(0, 1), sums, scored.scores[h])


def _head(x: LayerInput, h: int) -> LayerInput:
    group, one = x.q.shape[1] // x.k.shape[1], slice(h, h + 1)
    return replace(
        x,
        q=x.q[:, h * group : (h + 1) * group],
        k_ctx=x.k_ctx[:, one],
        lv_ctx=x.lv_ctx[:, one],
        k=x.k[:, one],
        v=x.v[:, one],
        lv=x.lv[:, one],
    )


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
