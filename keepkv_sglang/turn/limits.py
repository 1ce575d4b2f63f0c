"""What of the server decides about a turn: sizes and shares, no tensor and nothing of SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.turn.anchor import MessageBorder


class ArenaRows(Protocol):
    """Row numbers of the query arena (memory/arena.py): how many there are, and who has them."""

    rows: int

    @property
    def free_rows(self) -> int: ...

    def take(self, rows: int) -> list[int] | None:
        """`rows` row numbers, or None when the arena is too full."""
        ...

    def give_back(self, rows: list[int]) -> None: ...


@dataclass
class Skips:
    """Compressions that were due or planned and did not happen."""

    skipped_no_room: int = 0  # no slots beside the span
    skipped_no_window: int = 0  # no arena rows for a prompt's queries
    skipped_reply_window: int = 0  # no arena rows for a reply's queries


@dataclass
class Limits:
    """One scheduler process. `arena` and `skips` are shared with the runtime."""

    arena: ArenaRows
    skips: Skips = field(default_factory=Skips)
    border: MessageBorder | None = None
    references: bool = True  # whether queries can be moved: the model has one rotary embedding
    capacity: int = 0  # slots of the pool
    pool_limit: int = 1 << 62  # tokens from which a prompt cannot be in the pool uncompressed
    chunk_tokens: int = 0  # of a prefill chunk; 0: chunked prefill is off
    running: int = 1  # requests in the batch that is about to run

    def too_long(self, tokens: int) -> bool:
        """Whether so many tokens cannot all be in the pool at once: then they are compressed between chunks."""
        return tokens >= self.pool_limit

    def queries_of(self, config: KeepKVConfig) -> int:
        """Most arena rows that a prompt's span takes: its window and its references."""
        return config.window + (config.references if self.references else 0)

    def room_for_replies(self) -> bool:
        """Replies may use half of the arena: a prompt has one chance to be scored, a reply one per interval."""
        return 2 * self.arena.free_rows > self.arena.rows

    def reply_rows(self, config: KeepKVConfig) -> int:
        """Arena rows that one reply may hold: its window, and no more than an equal share of the replies' half."""
        share = self.arena.rows // (2 * max(1, self.running))
        return max(1, min(config.window, config.interval, share))


@dataclass(frozen=True)
class Row:
    """What a request asks of its next row. prompt: token ids; total: the prompt and what was generated before a
    retraction; prefix: how many of these the prefix cache has."""

    prompt: Sequence[int]
    total: int
    prefix: int

    @property
    def resumed(self) -> bool:
        """Whether a part of the reply is computed again with the prompt."""
        return self.total > len(self.prompt)
