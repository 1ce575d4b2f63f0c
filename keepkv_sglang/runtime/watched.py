"""What metrics want to know of single compressions, kept until they look. Nobody keeps it where metrics are off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from keepkv_sglang.memory.votes import VOTE_BOUNDS

PROMPT, REPLY, PRESSURE = KINDS = ("prompt", "reply", "pressure")


@dataclass
class Watched:
    """seconds: (one of KINDS, how long the scheduler was held) of each compression; on a GPU the work itself goes on
    behind it. votes: VoteStore.spread of its slots, by `bounds`, once the answer has asked what was merged."""

    bounds: ClassVar[tuple[float, ...]] = VOTE_BOUNDS
    seconds: list[tuple[str, float]] = field(default_factory=list)
    votes: list[list[float]] = field(default_factory=list)
