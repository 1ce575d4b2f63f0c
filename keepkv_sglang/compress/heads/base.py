"""What a policy of this package is given: scores that can be compared across heads, and how many tokens to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLOOR = 0.2
"""Share of the mean that every head keeps, whatever its scores. .1 and .3 give the same (docs/log.md)."""


@dataclass(frozen=True)
class Demand:
    """What the tokens of every head that compete for a cell are worth.

    shares [L, H, n] float, >= 0: of each layer and kv head, a token's part of what its head wants of all tokens. Those
    with a slot in any case count too: a head that looks at these alone needs few of the others. mean: tokens that a
    head keeps on average, 0..n; L H mean cells are shared out. least: tokens that every head keeps, 0..mean.
    """

    shares: torch.Tensor
    mean: int
    least: int

    @staticmethod
    def of(
        scores: torch.Tensor, mean: int, least: int = 0, floor: float = FLOOR, rivals: torch.Tensor | None = None
    ) -> Demand:
        """scores [L, H, tokens] of a scorer whose scores can be compared (registry.py); NaN and negative ones are worth
        nothing. rivals int64 [n]: the tokens that compete, by default all. least: as above, or `floor` of the mean
        where that is more. ValueError for numbers that cannot be met."""
        n = scores.shape[2] if rivals is None else len(rivals)
        if not 0 <= mean <= n or not 0 <= least <= mean or not 0.0 <= floor <= 1.0:
            raise ValueError(f"{mean} of {n} tokens on average, at least {least} and {floor} of the mean: not in order")
        most = torch.finfo(scores.dtype).max / max(1, scores.shape[2])
        worth = scores.nan_to_num(nan=0.0, neginf=0.0, posinf=most).clamp(min=0.0)
        total = worth.sum(2, keepdim=True)
        shares = worth / torch.where(total > 0, total, 1.0)
        least = max(least, math.ceil(round(floor * mean, 9)))
        return Demand(shares if rivals is None else shares[:, :, rivals], mean, least)


Sharing = Callable[[Demand], torch.Tensor]
"""Demand -> counts [L, H] int64: how many tokens each head keeps, d.least..n, L H d.mean in all. One with a true
attribute `by_layer` decides each layer without the others, H d.mean in each: layers are then scored and merged group by
group."""


def largest(shares: torch.Tensor, mean: int, least: int) -> torch.Tensor:
    """counts [G, H] of shares [G, H, n]: a group's H heads keep their H * mean largest tokens, `least` of each first.

    Equal shares: the one that is better placed in its own head, then the earlier head.
    """
    groups, heads = shares.shape[:2]
    extra = heads * (mean - least)
    order = shares.sort(2, descending=True).values[:, :, least:]
    # Place by place, the heads beside each other: a stable sort keeps that order among equals.
    beside = order.transpose(1, 2).flatten(1)
    taken = beside.sort(dim=1, descending=True, stable=True).indices[:, :extra]
    head = torch.remainder(taken, heads)
    return least + torch.zeros(groups, heads, dtype=torch.int64, device=shares.device).scatter_add_(
        1, head, torch.ones_like(head)
    )


def in_levels(counts: torch.Tensor, levels: int) -> torch.Tensor:
    """counts [L, H] int64 with the same sum and at most 2 * levels different values, each near what it was.

    Heads that keep equally many are merged together. The heads, in order of their counts, are cut into `levels` parts
    of equal size, and each part shares its sum out evenly; where it does not divide, its last heads get one more.
    """
    flat = counts.flatten()
    order = flat.sort(stable=True).indices
    out = flat.clone()
    for part in order.tensor_split(levels):
        if len(part):
            total = flat[part].sum()
            even = (total // len(part)).expand(len(part)).clone()
            even += torch.arange(len(part), device=flat.device) >= len(part) - total % len(part)
            out[part] = even
    return out.view(counts.shape)
