"""Which tokens of a span keep a slot, and which kept token each of the others joins. All kv heads batched.

Of the m slots, those of `whole` come first: such a token is kept in every head and nothing is merged into it. The
others compete for the rest: sinks, then what the `shares` are owed, then recent tokens, then by score.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keepkv_sglang.kernels.merge import nearest_kept

UNIFORM = "uniform"
"""SpanPolicy.heads: the same number of tokens in every layer and head."""
MATCH_WITHIN = 4096
"""Tokens of a block inside which keys are compared: the time of matching grows with the span, not with its square."""


@dataclass(frozen=True)
class SpanPolicy:
    """How a span of n tokens becomes m slots. `merge`, `scorer`: names as registry.py resolves them.

    recent: last tokens always kept (at most half of the slots that are not whole, or `carried`); sinks: first tokens
    always kept (0 unless the span starts at logical position 0); both count tokens that are not whole. Both, and the
    ceil(strong_fraction * slots) highest-scored of the kept tokens that are not whole, never absorb others. carried:
    tokens at the span's beginning that the last compression left raw (left_raw), a slot each; as many are left again.
    heads: how the cells of the m slots are shared out over layers and kv heads (compress/heads), where the pool can
    hold that (compress/packed.py).
    threshold: cosine similarity of keys above which a dropped token joins a kept one. pool_kernel: odd. chunk: tokens
    that are kept or not together (ChunkKV); 1: each on its own.

    whole: half-open ranges [start, end) of span indices, ascending and apart, that stay bit for bit as they are, in
    every head. shares: (start, end, least): at least so many tokens of [start, end) that are not whole are kept, in
    every head; apart as well. Where m is short, recent tokens give way to shares.
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
    whole: tuple[tuple[int, int], ...] = ()
    shares: tuple[tuple[int, int, int], ...] = ()
    carried: int = 0
    heads: str = UNIFORM

    @property
    def whole_tokens(self) -> int:
        """Slots that `whole` takes."""
        return sum(end - start for start, end in self.whole)

    @property
    def free(self) -> int:
        """Slots for the tokens that are not whole."""
        return self.m - self.whole_tokens


def select(scores: torch.Tensor, p: SpanPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [H, n] -> kept [H, m] int64, absorbs [H, m] bool; False: never rewritten.

    kept: the whole tokens, ascending, then the others, ascending. Those: sinks and recent first, then by score; equal
    scores: the lower index. Sinks, recent and the strongest kept tokens are protected. With p.chunk > 1 whole chunks
    are taken, best mean score first (`chunk_scores`); of the chunk that no longer fits, the first tokens.
    """
    if not p.whole:
        return _select(scores, chunk_scores(scores, p.chunk) if p.chunk > 1 else scores, p, p.shares)
    whole, free = whole_and_free(p.whole, scores.shape[1], scores.device)
    order = scores
    if p.chunk > 1:  # the mean of a chunk is that of the tokens that compete
        order = chunk_scores(scores.index_fill(1, whole, -torch.inf), p.chunk)
    shares = tuple((a - _before(p, a), b - _before(p, b), least) for a, b, least in p.shares)
    kept, absorbs = _select(scores[:, free], order[:, free], p, shares)
    whole = whole.expand(scores.shape[0], -1)
    return torch.cat((whole, free[kept]), 1), torch.cat((torch.zeros_like(whole, dtype=torch.bool), absorbs), 1)


def _select(
    scores: torch.Tensor, order: torch.Tensor, p: SpanPolicy, shares: tuple[tuple[int, int, int], ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that are not whole: scores [H, n], order [H, n] (what they are taken by) -> [H, p.free], likewise."""
    n = scores.shape[1]
    sinks, recent = always_kept(p)
    # NaN, from a NaN among the keys, would sort before what is forced, and inf with it.
    most = torch.finfo(scores.dtype).max
    scores, forced = (x.nan_to_num(nan=-torch.inf, posinf=most, neginf=-torch.inf) for x in (scores, order))
    forced[:, :sinks] = torch.inf
    forced[:, n - recent :] = torch.inf
    best = torch.sort(forced, dim=1, descending=True, stable=True).indices
    if shares:
        first = torch.zeros_like(forced, dtype=torch.int8)
        first[:, :sinks] = 1
        for start, end, least in shares:
            # Sinks and recent tokens of the range are part of its share: they stand before its other tokens.
            top = torch.sort(forced[:, start:end], dim=1, descending=True, stable=True).indices[:, :least]
            first.scatter_(1, top + start, 1)
        best = best.gather(1, torch.sort(first.gather(1, best), dim=1, descending=True, stable=True).indices)
    kept = best[:, : p.free].sort(dim=1).values
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
    stored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each dropped token joins the absorbing kept token of its block of MATCH_WITHIN tokens with the highest cosine
    similarity of keys, if above p.threshold (KeepKV, candidates). k [H, n, D], stored: the same as the pool has them;
    returns a new assign [H, n].

    Differs from the paper: it compares with all kept tokens.
    """
    n = assign.shape[1]
    # The same number of tokens is dropped in every head, so this is a rectangle. Whole tokens absorb nothing.
    dropped = torch.sort((assign >= 0).to(torch.int8), dim=1, stable=True).indices[:, : n - p.m]
    targets, allowed = kept[:, p.whole_tokens :], absorbs[:, p.whole_tokens :]
    similarity, column = nearest_kept(k, dropped, targets, allowed, MATCH_WITHIN, scratch_bytes, stored)
    joined = torch.where(similarity > p.threshold, column + p.whole_tokens, -1)
    return assign.scatter(1, dropped, joined)


def left_raw(p: SpanPolicy, n: int) -> int:
    """How many of the m slots, the last ones, are the last tokens of a span of n slots, one slot each in every head.

    They have their own keys, so a caller may take them in with what follows; a rule that fits all slots to each other
    (attention_matching) may have changed their values and votes. Whole tokens come first in `kept`, so only tokens
    behind the last of them count. None where there are shares: what a share keeps stays in the span.
    """
    if p.shares:
        return 0
    return min(always_kept(p)[1], n - (p.whole[-1][1] if p.whole else 0))


def own_cluster(kept: torch.Tensor, n: int) -> torch.Tensor:
    """assign [H, n] in which every kept token is alone and every other one is dropped."""
    number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.full((kept.shape[0], n), -1, dtype=torch.int64, device=kept.device).scatter_(1, kept, number)


def check_ranges(p: SpanPolicy, n: int) -> None:
    """ValueError for whole or shares that a span of n tokens cannot have."""
    for ranges in (p.whole, tuple(share[:2] for share in p.shares)):
        ends = [0, *(end for _, end in ranges)]
        if any(not at <= start < end <= n for at, (start, end) in zip(ends, ranges, strict=False)):
            raise ValueError(f"ranges {ranges} must be ascending, apart and inside a span of {n} tokens")
    if p.free < 1:
        raise ValueError(f"{p.whole_tokens} whole tokens leave none of the {p.m} slots for the others")
    for start, end, least in p.shares:
        if not 0 <= least <= end - start - (_before(p, end) - _before(p, start)):
            raise ValueError(f"{least} tokens of [{start}, {end}): no more than are there and not whole")
    if p.shares and sum(share[2] for share in p.shares) + always_kept(p)[0] > p.free:
        raise ValueError(f"the shares {p.shares} and {p.sinks} sinks do not fit {p.free} slots")


def always_kept(p: SpanPolicy) -> tuple[int, int]:
    """(sinks, recent tokens) that keep a slot in every head, of those that are not whole."""
    recent = min(p.recent, max(p.carried, p.free // 2))
    return min(p.sinks, p.free - recent), recent


def _strong(p: SpanPolicy) -> int:
    return min(p.free, math.ceil(round(p.strong_fraction * p.free, 9)))  # 0.1 * 70 is 7.000000000000001


def _before(p: SpanPolicy, index: int) -> int:
    """Whole tokens before this index of the span."""
    return sum(max(0, min(end, index) - start) for start, end in p.whole)


def whole_and_free(
    ranges: tuple[tuple[int, int], ...], n: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(span indices inside the ranges, those outside), ascending; made on the device, with no look at data."""
    borders = [0, *(border for pair in ranges for border in pair), n]
    parts = [torch.arange(a, b, device=device) for a, b in itertools.pairwise(borders)]
    return torch.cat([parts[0][:0], *parts[1::2]]), torch.cat(parts[::2])
