"""What was done and what came of it: one line per action and outcome, and what the server counted."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

COUNTED = (
    "compressions", "skipped_no_room", "retractions_published", "parked", "deferred", "pressure_merges", "unpacked",
    "streamed", "unpack_no_room", "unpack_incomplete", "archived_tokens", "archive_full_tokens", "archive_gaps",
    "refused_configurations", "answers", "answers_compressed", "answers_off", "mispublished",
)  # fmt: skip


class Tally:
    """Thread-safe. `failures`: what went wrong, in words."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.outcomes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # action -> sum, most
        self.numbers: dict[str, float] = defaultdict(float)
        self.failures: list[str] = []

    def note(self, action: str, outcome: str, seconds: float) -> None:
        with self._lock:
            self.outcomes[action][outcome] += 1
            times = self.seconds[action]
            times[0], times[1] = times[0] + seconds, max(times[1], seconds)

    def most(self, name: str, value: float) -> None:
        with self._lock:
            self.numbers[name] = max(self.numbers[name], value)

    def add(self, name: str, value: float = 1) -> None:
        with self._lock:
            self.numbers[name] += value

    def fail(self, what: str) -> None:
        with self._lock:
            self.failures.append(what)

    @property
    def actions(self) -> int:
        return sum(sum(outcomes.values()) for outcomes in self.outcomes.values())

    def table(self) -> str:
        lines = ["| action | times | outcomes | mean s | longest s |", "|---|---:|---|---:|---:|"]
        for name in sorted(self.outcomes):
            outcomes, (total, most) = self.outcomes[name], self.seconds[name]
            times = sum(outcomes.values())
            said = ", ".join(f"{what} {count}" for what, count in sorted(outcomes.items(), key=lambda item: -item[1]))
            lines.append(f"| {name} | {times} | {said} | {total / times:.2f} | {most:.1f} |")
        return "\n".join(lines)

    def counted(self, before: dict[str, Any], after: dict[str, Any]) -> str:
        """The server's counters, and our own numbers."""
        server = {name: after[name] - before[name] for name in COUNTED}
        return ", ".join(f"{name} {value:g}" for name, value in {**server, **self.numbers}.items() if value)
