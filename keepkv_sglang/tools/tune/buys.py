"""What budgets buy: the simulator's replays of a trace on one pool, in a bounded time."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.simulate import search
from keepkv_sglang.tools.simulate.replay import Result, Timing, replay
from keepkv_sglang.tools.simulate.traces import Workload

FIRST = 50  # requests that are replayed to learn how fast this machine replays


@dataclass(frozen=True)
class Bought:
    """pool: KV slots. requests: how many were replayed. ideal: stock SGLang on a pool that never runs out; stock: on
    this one; keepkv: on this one, by budget."""

    pool: int
    requests: int
    ideal: Result
    stock: Result
    keepkv: dict[float | int, Result]


def head(work: Workload, count: int) -> Workload:
    """The first requests in order of time: who carries one on comes later."""
    return Workload(work.scale, work.requests[:count], work.prompts[:count], work.replies[:count])


def affordable(work: Workload, replays: int, seconds: float, config: KeepKVConfig) -> Workload:
    """As many of the first requests as so many replays can take in `seconds`, at least FIRST: timed on these."""
    first = head(work, FIRST)
    rate = sum(map(len, first.prompts)) / search.ceiling(first, config).seconds
    until = list(itertools.accumulate(map(len, work.prompts)))
    return head(work, max(FIRST, bisect.bisect(until, rate * seconds / replays)))


def default_pool(work: Workload, ideal: Result) -> int:
    """A quarter of what the trace takes without a limit, and room for two of its longest requests."""
    computed = ideal.prompt_tokens - ideal.cached_tokens + sum(map(len, work.replies)) * work.scale
    return max(computed // 4, 2 * work.longest * work.scale)


def measure(
    work: Workload, pool: int, configs: Sequence[KeepKVConfig], timing: Timing, tick: Callable[[], Any]
) -> Bought:
    """pool: 0 for default_pool. configs: one per budget. tick: called once per request and replay."""
    options: dict[str, Any] = dict(timing=timing, tick=tick)
    ideal = search.ceiling(work, None, **options)
    pool = pool or default_pool(work, ideal)
    stock = replay(work, pool, None, **options)
    ours = {config.budget: replay(work, pool, config, **options) for config in configs}
    return Bought(pool, len(work.requests), ideal, stock, ours)
