"""Discrete events: a request arrives, its prompt is computed, its reply ends. See docs/simulate.md for the rules.

SGLang comes with world.py, imported where it is used: reports need no SGLang.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig

from .traces import Workload


@dataclass(frozen=True)
class Timing:
    """Durations where the trace has none: a prompt's uncached tokens at a rate, a reply's at a time per token."""

    prefill_rate: float = 20_000.0  # tokens per second
    seconds_per_token: float = 0.03


@dataclass
class Result:
    """One replay. Tokens and slots are real ones (simulated times scale)."""

    policy: str
    budget: float | int | None
    span_tokens: int
    pool: int
    scale: int
    requests: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    admitted_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    evicted_slots: int = 0
    compressions: int = 0
    skipped_windows: int = 0
    cut_replies: int = 0
    peak_slots: int = 0
    peak_requests: int = 0
    waited: int = 0
    waited_seconds: float = 0.0
    microseconds: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    unpacked_tokens: int = 0
    host_tokens: int = 0  # whose originals the host holds in the end

    @property
    def hit_rate(self) -> float:
        """Cached prompt tokens over the prompt tokens of all requests: a rejected one has hit nothing."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def admitted_hit_rate(self) -> float:
        """The same over the requests that ran. Differs where a pool is too small for some prompts."""
        return self.cached_tokens / self.admitted_tokens if self.admitted_tokens else 0.0


Tick = Callable[[], Any]
_DONE, _PREFILLED, _ARRIVE = 0, 1, 2  # at equal times what gives slots back comes first


def replay(
    workload: Workload,
    pool: int,
    config: KeepKVConfig | None,
    *,
    timing: Timing | None = None,
    max_running: int = 256,
    arena_rows: int = 0,
    huge: bool = False,
    check_every: int = 0,
    tick: Tick = lambda: None,
) -> Result:
    """Replays a workload on a pool of `pool` real tokens; stock SGLang when config is None.

    Raises AssertionError when a slot is lost, at the end or after every `check_every` events.
    max_running: most requests that run at once. arena_rows: limit of the arena for window queries in real tokens, 0
    for none; the server's is 512 MiB, 2,048 rows for a model of 32 layers with 32 heads of 128 at 16 bit. huge: an
    allocator for pools that never run out. tick: called once per request that ends. ValueError for a tiny pool.
    """

    from .world import World

    if pool // workload.scale < 16:
        raise ValueError(f"a pool of {pool} tokens is less than 16 slots at --scale {workload.scale}; use a larger one")
    world = World(
        config, pool // workload.scale, workload.scale, workload.longest, max_running, huge=huge, arena_rows=arena_rows
    )
    began = time.perf_counter()
    with world.running():
        run = _Replay(world, workload, timing or Timing(), tick)
        run.go(check_every)
        world.check()
        evicted, microseconds = world.evicted, world.stopwatch.microseconds()
        host = world.rt.originals.tokens if world.rt is not None and world.rt.originals is not None else 0
        world.flush()
    scale = workload.scale
    return Result(
        policy="stock" if config is None else "keepkv",
        budget=config.budget if config is not None else None,
        span_tokens=getattr(config, "span_tokens", 0),
        pool=pool,
        scale=scale,
        requests=len(workload.requests),
        rejected=run.rejected,
        prompt_tokens=sum(len(prompt) for prompt in workload.prompts) * scale,
        admitted_tokens=run.prompt * scale,
        cached_tokens=run.cached * scale,
        recomputed_tokens=run.recomputed * scale,
        evicted_slots=evicted * scale,
        compressions=int(world.rt.counters.compressions) if world.rt is not None else 0,
        skipped_windows=int(world.rt.counters.skipped_no_window) if world.rt is not None else 0,
        cut_replies=world.cut,
        peak_slots=world.peak * scale,
        peak_requests=run.peak_requests,
        waited=run.waited,
        waited_seconds=run.waited_seconds,
        microseconds=microseconds,
        counters=asdict(world.rt.counters) if world.rt is not None else {},
        seconds=time.perf_counter() - began,
        unpacked_tokens=world.rt.counters.unpacked_tokens * scale if world.rt is not None else 0,
        host_tokens=host * scale,
    )


class _Replay:
    """The event loop's state. Requests are indices into the workload."""

    def __init__(self, world: Any, workload: Workload, timing: Timing, tick: Tick) -> None:
        self.world, self.work, self.timing, self.tick = world, workload, timing, tick
        self.events: list[tuple[float, int, int]] = [(r.time, _ARRIVE, i) for i, r in enumerate(workload.requests)]
        heapq.heapify(self.events)
        self.waiting: deque[tuple[int, Any, float]] = deque()
        self.reqs: dict[int, Any] = {}
        self.over = [False] * len(workload.requests)
        self.matched = [0] * len(workload.requests)
        self.followers: dict[int, list[int]] = {}
        self.computed: set[int] = set()  # ids of blocks whose tokens were computed at some time
        self.rejected = self.prompt = self.cached = self.recomputed = 0
        self.peak_requests = self.waited = 0
        self.waited_seconds = 0.0

    def go(self, check_every: int) -> None:
        count, before = 0, 0.0
        while self.events:
            now, kind, index = heapq.heappop(self.events)
            (self._done, self._prefilled, self._arrive)[kind](index, now)
            steps = 1 + int((now - before) / self.timing.seconds_per_token)
            self.world.relieve([req for _, req, _ in self.waiting], steps)
            before = now
            self._admit(now)
            count += 1
            if check_every and count % check_every == 0:
                self.world.check()
        assert not self.waiting, "requests wait although nothing runs"

    def _arrive(self, index: int, now: float) -> None:
        parent = self.work.requests[index].parent
        if parent >= 0 and not self.over[parent]:  # its prompt holds a reply that is not there yet
            self.followers.setdefault(parent, []).append(index)
            return
        prompt, reply = self.work.prompts[index], self.work.replies[index]
        req = self.world.new_request(str(index), prompt, len(reply))
        if req.finished():
            self.rejected += 1
            self._over(index, now)
        else:
            self.waiting.append((index, req, now))

    def _admit(self, now: float) -> None:
        """First come, first served: who does not fit holds back those behind, as in SGLang."""
        while self.waiting:
            index, req, since = self.waiting[0]
            if not self.world.admit(req):
                if self.world.promised:
                    return
                # Alone in the server and still without room: it never will have any.
                self.waiting.popleft()
                self.rejected += 1
                self._over(index, now)
                continue
            self.waiting.popleft()
            matched = req.prefix_len
            if not self.world.prefill(req):
                self.world.abort(req)
                self.rejected += 1
                self._over(index, now)
                continue
            self._count(index, matched)
            self.waited += now > since
            self.waited_seconds += now - since
            self.reqs[index] = req
            self.peak_requests = max(self.peak_requests, len(self.reqs))
            heapq.heappush(self.events, (now + self._prefill_seconds(index), _PREFILLED, index))

    def _count(self, index: int, matched: int) -> None:
        self.matched[index] = matched
        size = self.work.requests[index].block_tokens // self.work.scale
        known = 0
        for block in self.work.requests[index].blocks:
            if block not in self.computed:
                break
            known += size
        self.prompt += len(self.work.prompts[index])
        self.cached += matched
        self.recomputed += max(0, known - matched)

    def _prefill_seconds(self, index: int) -> float:
        request = self.work.requests[index]
        if request.first_token is not None:
            return request.first_token
        missing = len(self.work.prompts[index]) - self.matched[index]
        seconds = missing * self.work.scale / self.timing.prefill_rate
        return min(seconds, request.seconds) if request.seconds is not None else seconds

    def _prefilled(self, index: int, now: float) -> None:
        request, req = self.work.requests[index], self.reqs[index]
        self.world.prefilled(req)
        self.computed.update(request.blocks)
        left = len(self.work.replies[index]) * self.work.scale * self.timing.seconds_per_token
        if request.seconds is not None:
            left = max(0.0, request.seconds - self._prefill_seconds(index))
        heapq.heappush(self.events, (now + left, _DONE, index))

    def _done(self, index: int, now: float) -> None:
        self.world.finish(self.reqs.pop(index), self.work.replies[index])
        self._over(index, now)

    def _over(self, index: int, now: float) -> None:
        self.over[index] = True
        self.tick()
        for follower in self.followers.pop(index, ()):
            self._arrive(follower, now)
