"""What is asked of a server: agents, traces, many decoding requests, short prompts. Each returns its calls.

A workload has `total` requests and `run(port, tick)`; it is the same, token for token, for every server, except that
agents feed the server's own replies back.
"""

from __future__ import annotations

import random
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from keepkv_sglang.tools.agent_load import GENERATION_PROMPT, AgentLoad
from keepkv_sglang.tools.simulate.traces import BORDER as TRACE_BORDER
from keepkv_sglang.tools.simulate.traces import Workload as Trace

from .client import Call, generate

Tick = Callable[[], object]
FIRST_TOKEN, TOKENS = 1000, 39_000  # ordinary tokens of the demo model: [FIRST_TOKEN, FIRST_TOKEN + TOKENS)


class Workload(Protocol):
    """total: requests that it sends when none fails. longest: tokens of the longest prompt with its reply."""

    @property
    def total(self) -> int: ...

    @property
    def longest(self) -> int: ...

    def run(self, port: int, tick: Tick) -> list[Call]:
        """Sends everything to 127.0.0.1:port and waits for all answers; tick after each."""
        ...


@dataclass(frozen=True)
class Agents:
    """`synthetic`: agents of agent_load.py. All at once; an agent's turns follow each other, replies fed back."""

    load: AgentLoad

    @property
    def total(self) -> int:
        return self.load.agents * self.load.turns

    @property
    def longest(self) -> int:
        return self.load.context

    def run(self, port: int, tick: Tick) -> list[Call]:
        calls: list[Call] = []
        _together([lambda i=i: self._agent(port, i, calls, tick) for i in range(self.load.agents)])  # type: ignore[misc]
        return calls

    def _agent(self, port: int, index: int, calls: list[Call], tick: Tick) -> None:
        load = self.load
        history = load.message(load.system, -1)
        for turn in range(load.turns):
            history += load.message(load.task if turn == 0 else load.tool_result, index, turn)
            prompt = history + [1] * GENERATION_PROMPT
            call = generate(port, Call(index, turn, prompt, load.reply))
            calls.append(call)
            tick()
            if not call.ok:
                return
            history = prompt + call.output


@dataclass(frozen=True)
class AllAtOnce:
    """`decode` and `short`: requests with prompts of their own, at most `at_once` in flight, 0 for all."""

    requests: int
    prompt: int
    new_tokens: int
    at_once: int = 0
    seed: int = 0

    @property
    def total(self) -> int:
        return self.requests

    @property
    def longest(self) -> int:
        return self.prompt + self.new_tokens

    def run(self, port: int, tick: Tick) -> list[Call]:
        calls = [Call(i, 0, self._prompt(i), self.new_tokens) for i in range(self.requests)]
        waiting = iter(calls)
        lock = threading.Lock()

        def worker() -> None:
            while True:
                with lock:
                    call = next(waiting, None)
                if call is None:
                    return
                generate(port, call)
                tick()

        _together([worker] * (self.at_once or self.requests))
        return calls

    def _prompt(self, index: int) -> list[int]:
        rng = random.Random(repr((self.seed, index)))
        return [rng.randrange(FIRST_TOKEN, FIRST_TOKEN + TOKENS) for _ in range(self.prompt)]


@dataclass(frozen=True)
class Replay:
    """`traces`: requests at their arrival times, after the request whose reply they carry on.

    Prompts are the trace's: they contain the trace's replies, not the server's, so every server sees the same ones
    and a generated reply is never found again. border: the token that ends a first message. speed: trace seconds per
    second.
    """

    trace: Trace
    speed: float
    border: int = 2
    max_reply: int = 64

    @property
    def total(self) -> int:
        return len(self.trace.requests)

    @property
    def longest(self) -> int:
        return max(len(p) + min(len(r), self.max_reply) for p, r in self._pairs())

    def _pairs(self) -> list[tuple[array[int], array[int]]]:
        return list(zip(self.trace.prompts, self.trace.replies, strict=True))

    def run(self, port: int, tick: Tick) -> list[Call]:
        began = time.perf_counter()
        first = min(request.time for request in self.trace.requests)
        over = [threading.Event() for _ in self.trace.requests]
        calls = [
            Call(i, 0, tokens_of(prompt, self.border), min(len(reply), self.max_reply))
            for i, (prompt, reply) in enumerate(self._pairs())
        ]

        def one(index: int) -> None:
            request, call = self.trace.requests[index], calls[index]
            time.sleep(max(0.0, began + (request.time - first) / self.speed - time.perf_counter()))
            if request.parent >= 0:
                over[request.parent].wait()
            generate(port, call)
            over[index].set()
            tick()

        _together([lambda i=i: one(i) for i in range(len(calls))])  # type: ignore[misc]
        return calls


def tokens_of(ids: Sequence[int], border: int) -> list[int]:
    """Ids of a trace as tokens of a vocabulary: equal ids become equal tokens, the trace's border the model's.

    Different ids may share a token (there are more ids than tokens); a long common prefix by accident cannot arise,
    since neighbouring ids are scattered.
    """
    # Knuth's multiplicative hash: neighbours in a block do not become neighbours in the vocabulary.
    return [
        border if i == TRACE_BORDER else FIRST_TOKEN + (i * 2654435761 % (1 << 32)) * TOKENS // (1 << 32) for i in ids
    ]


def _together(jobs: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
