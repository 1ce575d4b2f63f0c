"""How far two answers to the same tokens are apart, token by token and in log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keepkv_sglang.tools.verify.server import Answer, LogProbs


@dataclass(frozen=True)
class Difference:
    """mean, worst: of |log-probability - log-probability|, in nats, over `tokens` places. parted: the first generated
    token that differs, counted from 1; None where all are the same."""

    tokens: int
    mean: float
    worst: float
    parted: int | None


def difference(pairs: Sequence[tuple[Answer, Answer]], generated: int | None = None) -> Difference:
    """Over the generated and the given tokens of all pairs. generated: only so many of each answer's generated tokens.

    Two answers are compared up to the first token in which they differ, that token included: what comes behind it has
    another history. There the tokens of both count, and the larger difference.
    """
    apart: list[float] = []
    parted = None
    for one, other in pairs:
        apart += [abs(a - b) for a, b in zip(one.given, other.given, strict=True)]
        steps = zip(one.ids[:generated], other.ids[:generated], one.top, other.top, strict=False)
        for place, (a, b, first, second) in enumerate(steps, 1):
            apart.append(max(_at(first, second, token) for token in {a, b}))
            if a != b:
                parted = parted or place
                break
    return Difference(len(apart), float(np.mean(apart)), float(np.max(apart)), parted)


def _at(first: LogProbs, second: LogProbs, token: int) -> float:
    """A token that is not among the most probable of one answer is at most as probable as the last of these."""
    one, other = (values.get(token, min(values.values())) for values in (first, second))
    return abs(one - other)


def divergence(full: Answer, other: Answer) -> float:
    """Mean KL(full || other) over the given tokens' places, in nats.

    Of each place both answers name their most probable tokens. Those that both name count one by one, all others as
    one: a lower bound of the KL over all tokens.
    """
    return float(np.mean([_kl(p, q) for p, q in zip(full.given_top, other.given_top, strict=True)]))


def _kl(p: LogProbs, q: LogProbs) -> float:
    both = p.keys() & q.keys()
    rest = [max(1e-9, 1 - math.fsum(math.exp(x[token]) for token in both)) for x in (p, q)]
    named = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    return named + rest[0] * math.log(rest[0] / rest[1])
