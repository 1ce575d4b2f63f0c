"""Questions over many replays: what an unlimited pool gives, and the pool where stock gets half of its ideal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig

from .replay import Result, replay
from .traces import Workload

Replay = Callable[[int, KeepKVConfig | None], Result]


def ceiling(workload: Workload, config: KeepKVConfig | None, **options: Any) -> Result:
    """A replay whose pool never runs out: for stock the ideal, for KeepKV what atomic spans leave of it."""
    return replay(workload, (workload.total + 1000) * workload.scale, config, huge=True, **options)


def half_ideal_pool(workload: Workload, ideal: float, run: Replay, precision: float = 0.02) -> tuple[int, Result]:
    """The pool (real tokens) at which stock's hit rate is half of `ideal`, and its replay there.

    Bisection over the logarithm of the pool until the interval is `precision` wide; the upper end is taken, so the hit
    rate is at least the half. It may lie below the longest prompts: stock refuses those, which counts as no hits. The
    hit rate need not grow steadily there, so this is one such pool, not always the only one.
    """
    low, high = 64 * workload.scale, (workload.total + 1000) * workload.scale
    best = None
    while high > (1 + precision) * low:
        middle = round((low * high) ** 0.5)
        result = run(middle, None)
        if result.hit_rate >= ideal / 2:
            high, best = middle, result
        else:
            low = middle
    assert best is not None
    return high, best


@dataclass(frozen=True)
class Claim:
    """KeepKV at the pool where stock gets half of its ideal, against KeepKV without a limit."""

    ideal: Result
    stock: Result
    keepkv: Result
    ceiling: Result

    @property
    def share_of_ceiling(self) -> float:
        return self.keepkv.hit_rate / self.ceiling.hit_rate if self.ceiling.hit_rate else 0.0

    def line(self) -> str:
        k, c = self.keepkv, self.ceiling
        return (
            f"budget {k.budget}, span tokens {k.span_tokens}, pool {k.pool:,}: stock {self.stock.hit_rate:.1%} of its "
            f"ideal {self.ideal.hit_rate:.1%}, keepkv {k.hit_rate:.1%} of its ceiling {c.hit_rate:.1%} "
            f"({self.share_of_ceiling:.1%} of it)"
        )


def examine(workload: Workload, configs: list[KeepKVConfig], **options: Any) -> list[Claim]:
    """One claim per configuration. options: replay()'s."""
    ideal = ceiling(workload, None, **options)
    pool, stock = half_ideal_pool(workload, ideal.hit_rate, lambda p, c: replay(workload, p, c, **options))
    return [
        Claim(ideal, stock, replay(workload, pool, config, **options), ceiling(workload, config, **options))
        for config in configs
    ]
