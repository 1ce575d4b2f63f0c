"""Compressions that found no room are said, not only counted."""

from __future__ import annotations

import time
from collections.abc import Callable

from keepkv_sglang.turn.limits import Skips

EVERY_S = 60.0
ADVICE = {
    "skipped_no_room": "the KV pool had no slots for the result: a larger pool, or fewer requests at once"
    " (--max-running-requests)",
    "skipped_no_window": "the query arena was full of prompts: fewer at once (--max-prefill-tokens), or fewer reference"
    " queries (--keepkv-references)",
    "skipped_reply_window": "the query arena was full of replies: fewer requests at once (--max-running-requests), or a"
    " smaller --keepkv-window",
}


class SkipWatch:
    """What was skipped since it was last said. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._said = clock, dict.fromkeys(ADVICE, 0)
        self._next = 0.0

    def look(self, skips: Skips) -> str | None:
        """One line when something was skipped since the last one, at most every EVERY_S seconds; else None."""
        now = {name: getattr(skips, name) for name in ADVICE}
        if now == self._said or self._clock() < self._next:
            return None
        new = {name: count - self._said[name] for name, count in now.items() if count != self._said[name]}
        self._said, self._next = now, self._clock() + EVERY_S
        parts = [f"{count} because {ADVICE[name]}" for name, count in new.items()]
        return f"compressions were skipped, and these tokens keep their slots: {'; '.join(parts)}"
