"""Synthetic multi-turn agents against a live server: one shared system prompt, a task and tool results of their own.

Every reply is fed back token for token, as an agent framework does, so the next turn's prompt begins with everything
the agent has seen. All agents run at once; an agent's turns follow each other.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from keepkv_sglang.server_process import ServerProcess

GENERATION_PROMPT = 4  # tokens between the last message and the reply


@dataclass(frozen=True)
class AgentLoad:
    """What the agents do. All sizes in tokens; border: the chat template's end-of-message token."""

    agents: int = 6
    turns: int = 4
    system: int = 300
    task: int = 500
    tool_result: int = 150
    reply: int = 24
    border: int = 2
    seed: int = 0

    @property
    def context(self) -> int:
        """Tokens of one agent's last prompt and reply."""
        messages = self.system + self.task + (self.turns - 1) * self.tool_result
        return messages + (self.turns + 1) + self.turns * (GENERATION_PROMPT + self.reply)

    def message(self, count: int, *place: int) -> list[int]:
        """Random ordinary tokens, the same for the same place, and a border."""
        rng = random.Random(repr((self.seed, place)))
        return [rng.randrange(1000, 40000) for _ in range(count)] + [self.border]


@dataclass
class AgentReport:
    """Sums over all requests. hit_rate is SGLang's own cached_tokens over prompt tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_compressed_tokens: int = 0
    generated_tokens: int = 0
    short_answers: int = 0
    errors: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    outputs: dict[int, list[int]] = field(default_factory=dict)  # by agent, all replies joined

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def turns_per_second(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0


def run_agents(server: ServerProcess, load: AgentLoad) -> AgentReport:
    """Runs all agents to their end. A failed request ends its agent and is listed in errors."""
    report, lock = AgentReport(), threading.Lock()
    threads = [threading.Thread(target=_agent, args=(server, load, i, report, lock)) for i in range(load.agents)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.seconds = time.perf_counter() - began
    return report


def _agent(server: ServerProcess, load: AgentLoad, index: int, report: AgentReport, lock: threading.Lock) -> None:
    history = load.message(load.system, -1)
    for turn in range(load.turns):
        history += load.message(load.task if turn == 0 else load.tool_result, index, turn)
        prompt = history + [1] * GENERATION_PROMPT
        sampling = {"temperature": 0, "max_new_tokens": load.reply, "ignore_eos": True}
        status, answer = server.post_json("/generate", {"input_ids": prompt, "sampling_params": sampling})
        with lock:
            if status != 200:
                report.errors.append((index, turn, status, answer))
                return
            meta = answer["meta_info"]
            report.requests += 1
            report.prompt_tokens += len(prompt)
            report.cached_tokens += meta["cached_tokens"]
            report.cached_compressed_tokens += (meta.get("keepkv") or {}).get("cached_compressed_tokens", 0)
            report.generated_tokens += len(answer["output_ids"])
            report.short_answers += len(answer["output_ids"]) != load.reply
            report.outputs.setdefault(index, []).extend(answer["output_ids"])
        history = prompt + answer["output_ids"]
