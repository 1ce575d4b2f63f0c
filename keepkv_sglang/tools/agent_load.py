"""What synthetic multi-turn agents say: one shared system prompt, a task and tool results of their own.

Every reply is fed back token for token, as an agent framework does, so the next turn's prompt begins with everything
the agent has seen. `bench/workloads.py` runs them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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
