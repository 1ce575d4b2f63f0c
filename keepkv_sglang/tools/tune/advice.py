"""One recommendation, in words, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAME = 0.01
"""Hit rates that differ by less are the same: a trace says no more about the traffic to come."""


@dataclass(frozen=True)
class Choice:
    """One budget: hit rate on the pool, and top-1 agreement with the full cache, None where it is not known."""

    budget: float
    hit_rate: float
    top1: float | None


def advice(choices: Sequence[Choice], stock: float, ideal: float, least_top1: float, originals: bool) -> str:
    """stock, ideal: hit rates without KeepKV, on the pool and without a limit. least_top1: agreement that is asked for.
    originals: whether they were kept.

    Of the budgets that agree well enough the largest is taken that hits as much as any of them: it loses least.
    """
    if stock >= ideal - SAME:
        return (
            f"Leave KeepKV off. Stock SGLang finds {stock:.1%} of the prompt tokens in this pool, and no pool gives"
            f" more than {ideal:.1%}: there are no hits to win. What waits or is rejected is in the table."
        )
    known = any(choice.top1 is not None for choice in choices)
    good = [choice for choice in choices if choice.top1 is None or choice.top1 >= least_top1]
    if not good:
        best = max(choices, key=lambda choice: choice.top1 or 0)
        more = "" if originals else " Try --host-ratio 1: later turns are then read over originals."
        return (
            f"Leave KeepKV off. No budget agrees with the full cache in {least_top1:.0%} of the tokens; {best.budget:g}"
            f" comes nearest, with {best.top1:.1%}.{more}"
        )
    most = max(choice.hit_rate for choice in good)
    if most < stock + SAME:
        return (
            f"Leave KeepKV off. The budgets that agree find {most:.1%} of the prompt tokens in this pool, stock SGLang"
            f" {stock:.1%}."
        )
    taken = max((choice for choice in good if choice.hit_rate >= most - SAME), key=lambda choice: choice.budget)
    parts = [
        f"Use --keepkv-budget {taken.budget:g}. It finds {taken.hit_rate:.1%} of the prompt tokens in this pool, stock"
        f" SGLang {stock:.1%}, a pool without a limit {ideal:.1%}."
    ]
    if taken.top1 is not None:
        parts.append(f"It agrees with the full cache in {taken.top1:.1%} of the tokens.")
    smaller = max((c for c in choices if c.budget < taken.budget), key=lambda c: c.budget, default=None)
    if smaller is not None:
        agrees = f" and agrees in {smaller.top1:.1%}" if smaller.top1 is not None else ""
        parts.append(f"The next smaller one, {smaller.budget:g}, finds {smaller.hit_rate:.1%}{agrees}.")
    if not known:
        parts.append("No text was evaluated: what this costs in quality is not known.")
    return " ".join(parts)
