"""How many tokens each layer and kv head keeps of a span, one file per policy."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.heads.base import Demand, Sharing, in_levels
from keepkv_sglang.compress.registry import HEADS, INCOMPARABLE_SCORERS, SCORERS
from keepkv_sglang.compress.select import UNIFORM, SpanPolicy, always_kept, whole_and_free

SHORT = 1024
"""Tokens of a span whose work is mostly starting operations: on a CPU each head by itself takes three times as long as
all heads together, and 90 heads in 8 levels little longer than together (docs/log.md)."""
LEVELS = 8

__all__ = ["Demand", "Sharing", "comparable", "get_sharing", "slots_of_heads"]


def get_sharing(name: str) -> Sharing:
    """The policy called `name` (registry.py: what a name can be); ValueError for an unknown name."""
    return HEADS.get(name)


def slots_of_heads(scores: torch.Tensor, p: SpanPolicy, name: str) -> list[list[int]]:
    """counts [L][H]: slots of each layer and kv head of a span, p.m on average, by the policy called `name`.

    scores [L, H, n] of p.scorer. Whole tokens, sinks and recent tokens have a slot in every head; what is left is
    shared out. p.m everywhere where the scorer's scores cannot be compared across heads.
    """
    if not comparable(p.scorer):
        name = UNIFORM
    free = whole_and_free(p.whole, scores.shape[2], scores.device)[1]
    sinks, recent = always_kept(p)
    rivals = free[sinks : len(free) - recent]
    owed = min(sum(share[2] for share in p.shares), p.free - sinks - recent)
    sharing = get_sharing(name)
    counts = sharing(Demand.of(scores, p.free - sinks - recent, owed, rivals=rivals))
    if not getattr(sharing, "by_layer", False) and (scores.shape[2] < SHORT or not scores.is_cpu):
        counts = in_levels(counts, LEVELS)
    return (counts + (p.whole_tokens + sinks + recent)).tolist()


def comparable(scorer: str) -> bool:
    """Whether a scorer's scores say how much a head needs."""
    if scorer in SCORERS.names:
        return scorer not in INCOMPARABLE_SCORERS
    return bool(getattr(SCORERS.get(scorer), "comparable", True))
