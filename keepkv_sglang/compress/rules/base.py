"""What a merge rule sees and returns, and the sums over clusters that several rules share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from keepkv_sglang.compress.window import Window, trusted
from keepkv_sglang.kernels.merge import merge_segments
from keepkv_sglang.kernels.merge.torch_impl import (
    Segments,
    segment_max,
    segment_sum,
)


@dataclass(frozen=True)
class Clusters:
    """H heads, m clusters each; compute dtype (float32, or float64 for float64 storage).

    k, v [H, n, D]; lv [H, n] log votes; assign [H, n] cluster of each token, -1 dropped; window: the queries
    Q and what they give to the span; seg: the members of all clusters. fixed: the first so many clusters are
    single tokens that no rule may rewrite; a rule that fits slots to each other takes them as given.
    """

    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    assign: torch.Tensor
    window: Window
    seg: Segments
    fixed: int = 0

    def per_cluster(self, flat: torch.Tensor) -> torch.Tensor:
        """[H * m, F] -> [H, m, F]."""
        return flat.view(self.seg.heads, self.seg.m, -1)

    def members(self, per_token: torch.Tensor) -> torch.Tensor:
        """[H, n] -> [T], one entry per member."""
        return per_token.flatten()[self.seg.rows]

    def means(self, log_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means of keys and of values, sum_i w_i x_i / sum_i w_i, each [H, m, D], and [H, m] log sum_i p_i; log_w [T]
        per member."""
        return merge_segments(self.k, self.v, self.lv, log_w, self.seg)

    def outputs(self) -> torch.Tensor:
        """[H, Q, D]: the span's part of the queries' attention outputs."""
        if self.window.sums is not None and self.window.sums.output is not None:
            return self.window.sums.output
        first_hidden = self.window.first_hidden
        output = self.v.new_zeros(())
        for block in self.window.blocks():
            attention = self.window.attention(block)
            seen = min(max(first_hidden - block.start, 0), attention.shape[1])
            output = output + attention[:, :seen].transpose(1, 2) @ self.v[:, block][:, :seen]
            if seen < attention.shape[1]:
                hidden = self.window.hidden(slice(block.start + seen, block.stop))
                late = attention[:, seen:].masked_fill(hidden, 0.0)
                output = output + late.transpose(1, 2) @ self.v[:, block][:, seen:]
        return output

    def log_share(self) -> torch.Tensor:
        """[H, m, Q]: log of sum_{i in C} p_i exp(l_qi) / Z_q, the share of each query's attention that the
        cluster gets (0 for single-member clusters, whose result nobody reads). Holds a few tensors of that size: rules
        that ask for it are `by_slots`."""
        single = (self.seg.counts == 1)[:, None]
        if len(self.window.blocks()) == 1:
            total = segment_sum(
                self.window.attention(self.window.blocks()[0]).flatten(0, 1), self.seg, None, self.seg.rows
            )
        else:
            total = self._sum((segment_sum(x.exp_(), seg), at) for x, seg, at in self._members())
        total = total.masked_fill(single, 1.0)
        if trusted(total):
            return self.per_cluster(total.log_())
        top = total.new_full(total.shape, torch.finfo(total.dtype).min)
        for x, seg, at in self._members():
            top[at] = torch.maximum(top[at], segment_max(x, seg))
        shifted = ((x.sub_(top[at][seg.cluster]), seg, at) for x, seg, at in self._members())
        total = self._sum((segment_sum(x.exp_(), seg), at) for x, seg, at in shifted)
        return self.per_cluster((total.log_() + top).masked_fill(single, 0.0))

    def slots(self, part: torch.Tensor) -> Clusters:
        """Clusters `part` [P], ascending, of every head alone; `assign` is the whole one."""
        return replace(self, seg=self.seg.slots(part), fixed=int((part < self.fixed).sum()))

    def _members(self) -> Iterator[tuple[torch.Tensor, Segments, slice]]:
        """(x [T, Q], their Segments, the flat clusters these are of) of clusters with more than one member, as many
        members of a head at a time as the window has tokens in a block; x: lv_i + l_qi - log Z_q."""
        many = F.pad(self.seg.counts, (0, 1))[self.seg.cluster] > 1  # behind the members: none
        rows, clusters, (heads, n) = self.seg.rows[many], self.seg.cluster[many], self.assign.shape
        ends = torch.bincount(rows // n, minlength=heads).cumsum(0).tolist()
        for h, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            keys, lv, q = self.k[h], self.lv[h], self.window.q[h].T
            for at in range(start, end, self.window.block_tokens):
                token = rows[at : min(end, at + self.window.block_tokens)] - h * n
                cluster = clusters[at : at + len(token)]
                first, last = int(cluster[0]), int(cluster[-1])
                x = (keys[token] @ q).add_(lv[token, None]).sub_(self.window.log_z[h])
                yield x, Segments.sorted(cluster - first, token, 1, last + 1 - first), slice(first, last + 1)

    def _sum(self, parts: Iterable[tuple[torch.Tensor, slice]]) -> torch.Tensor:
        """[H * m, Q]: parts [C, Q] added up at the flat clusters they are of."""
        total = self.k.new_zeros(self.seg.heads * self.seg.m, self.window.q.shape[1])
        for part, at in parts:
            total[at] += part
        return total

    def mean_over_queries(self, log_share: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Mean over Q of value [H, m, Q], weighted by exp(log_share) -> [H, m]."""
        return (torch.softmax(log_share, dim=2) * value).sum(dim=2)


class Merged(NamedTuple):
    """k, v [H, m, D] and lv [H, m], compute dtype. accepted [H, m] bool or None (all): False where a guard
    forbids the merge; the caller then keeps the kept token as it is and drops the others. Entries of
    single-member clusters are ignored by the caller, which copies them bit for bit, unless rewrites_all."""

    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    accepted: torch.Tensor | None = None
    rewrites_all: bool = False


class MergeRule(Protocol):
    """A pure function of the clusters; mutates nothing. One with a true attribute `reads_outputs` gets the queries'
    attention outputs computed with their scores, where a kernel does that (Window.sums)."""

    def __call__(self, c: Clusters) -> Merged: ...


def by_slots(rule: Callable[[Clusters], Merged]) -> Callable[[Clusters], Merged]:
    """The rule, some clusters at a time where the window's tokens go in blocks: as many clusters as a block has tokens,
    those that are single in all heads left out. For a rule that finds each cluster without the others."""

    @functools.wraps(rule)
    def some_at_a_time(c: Clusters) -> Merged:
        if len(c.window.blocks()) == 1:
            return rule(c)
        k, v, lv = c.means(c.members(c.lv))
        many = (c.seg.counts.view(c.seg.heads, c.seg.m) > 1).any(dim=0)
        for part in many.nonzero()[:, 0].split(c.window.block_tokens):
            if len(part):
                k[:, part], v[:, part], lv[:, part] = rule(c.slots(part))[:3]
        return Merged(k, v, lv)

    return some_at_a_time
