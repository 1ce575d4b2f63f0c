"""What a merge rule sees and returns, and the sums over clusters that several rules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from keepkv_sglang.kernels.merge import merge_segments
from keepkv_sglang.kernels.merge.torch_impl import (
    Segments,
    segment_max,
    segment_sum,
)
from keepkv_sglang.scoring.base import Window, trusted


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

    def log_share(self) -> torch.Tensor:
        """[H, m, Q]: log of sum_{i in C} p_i exp(l_qi) / Z_q, the share of each query's attention that the
        cluster gets (0 for single-member clusters, whose result nobody reads)."""
        blocks = [(block, self._members_in(block)) for block in self.window.blocks()]
        single = (self.seg.counts == 1)[:, None]
        shares = [segment_sum(self.window.attention(b).flatten(0, 1), s, None, s.rows) for b, s in blocks]
        total = _sum(shares).masked_fill(single, 1.0)
        if trusted(total):
            return self.per_cluster(total.log_())
        top = torch.stack([segment_max(self._log_attention(b, s), s) for b, s in blocks]).amax(dim=0)
        shares = [segment_sum(self._log_attention(b, s).sub_(top[s.cluster]).exp_(), s) for b, s in blocks]
        return self.per_cluster((_sum(shares).log_() + top).masked_fill(single, 0.0))

    def _members_in(self, block: slice) -> Segments:
        if block.stop - block.start == self.assign.shape[1]:
            return self.seg
        return Segments.from_assignment(self.assign[:, block], self.seg.m)

    def _log_attention(self, block: slice, seg: Segments) -> torch.Tensor:
        """[T, Q]: lv_i + l_qi - log Z_q for the members in a block."""
        x = self.window.logits(block).add_(self.lv[:, block, None]).sub_(self.window.log_z[:, None, :])
        return x.flatten(0, 1).index_select(0, seg.rows)

    def mean_over_queries(self, log_share: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Mean over Q of value [H, m, Q], weighted by exp(log_share) -> [H, m]."""
        return (torch.softmax(log_share, dim=2) * value).sum(dim=2)


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


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
