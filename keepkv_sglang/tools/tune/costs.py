"""What budgets cost: KL and top-1 agreement with the full cache on the trace's own conversations, in a bounded time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.evaluate.methods import DEFAULT, OURS
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.task import Setup
from keepkv_sglang.tools.evaluate.turns import MOST_TOKENS, Item, Turns
from keepkv_sglang.tools.report.statistics import Estimate, geometric_mean, weighted_mean

ENOUGH_TOKENS = 1024
"""Of a conversation that is read, but for its first turn: further turns cost more than another conversation tells."""


@dataclass(frozen=True)
class Cost:
    """Over the replies of some conversations. kl: nats a token, geometric mean over conversations. top1: share of reply
    tokens for which the most probable token is the full cache's. held: slots per token before the last reply."""

    conversations: int
    kl: Estimate
    top1: Estimate
    held: float


def sample(items: Iterable[Item]) -> list[Item]:
    """In an order by chance, the same each time: of each the first turn, and those that end within ENOUGH_TOKENS. A
    first turn of more than the evaluator's MOST_TOKENS is left out."""
    cut = [short for short in map(_short, items) if short.turns]
    return random.Random(0).sample(cut, len(cut))


def _short(item: Item) -> Item:
    turns: list[tuple[list[int], list[int]]] = []
    tokens = 0
    for prompt, reply in item.turns:
        tokens += len(prompt) + len(reply)
        if tokens > (ENOUGH_TOKENS if turns else MOST_TOKENS) or not reply:
            break
        turns.append((prompt, reply))
    return replace(item, turns=tuple(turns))


def measure(
    probe: Probe,
    items: Sequence[Item],
    budgets: Sequence[float],
    originals: str,
    seconds: float,
    tick: Callable[[], Any],
) -> dict[float, Cost]:
    """One item after the other, at all budgets, until the next one would not be over in time: at least one. tick:
    called once per item. Empty without items."""
    task, method = Turns(), replace(OURS[DEFAULT], originals=originals)
    setup = Setup(probe, Path(), "", 0, 0, [method], budgets, [originals])
    rows: dict[float, list[dict[str, Any]]] = {budget: [] for budget in budgets}
    began = time.perf_counter()
    for done, item in enumerate(items):
        spent = time.perf_counter() - began
        if done and spent * (done + 1) / done > seconds:
            break
        prepared = task.prepare(setup, item)
        for budget in budgets:
            rows[budget].append(task.measure(setup, prepared, method, budget))
        tick()
    return {budget: _cost(made) for budget, made in rows.items() if made}


def _cost(rows: Sequence[dict[str, Any]]) -> Cost:
    weights = [sum(row["reply_tokens"]) for row in rows]

    def mean(name: str) -> list[float]:
        return [
            sum(x * n for x, n in zip(row[name], row["reply_tokens"], strict=True)) / total
            for row, total in zip(rows, weights, strict=True)
        ]

    held = sum(row["slots"][-1] for row in rows) / sum(row["tokens"][-1] for row in rows)
    return Cost(len(rows), geometric_mean(mean("kl")), weighted_mean(mean("top1"), weights), held)
