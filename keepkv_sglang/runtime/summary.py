"""One line a minute says what KeepKV did, when it did something."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from keepkv_sglang.runtime.counters import Counters

EVERY_S = 60.0


class Summary:
    """What was counted since the last line. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._said = clock, Counters()
        self._began: float | None = None  # when the first thing happened that is not said yet

    def look(self, counters: Counters) -> str | None:
        """The line, EVERY_S seconds after the first thing that it tells of; else None. Call it often: between steps,
        and while nothing runs."""
        said = self._said
        if self._began is None:
            happened = (counters.answers, counters.compressions, counters.pressure_merges)
            if happened != (said.answers, said.compressions, said.pressure_merges):
                self._began = self._clock()
            return None
        spent = self._clock() - self._began
        if spent < EVERY_S:
            return None
        self._said, self._began = replace(counters), None
        return f"KeepKV in {spent:.0f} s: {'; '.join(_parts(counters, said))}"


def _parts(now: Counters, before: Counters) -> list[str]:
    def new(name: str) -> float:
        return getattr(now, name) - getattr(before, name)

    parts = [
        f"{new('answers'):,.0f} requests ended, {new('answers_compressed'):,.0f} of them compressed, with"
        f" {new('logical_tokens') - new('saved_slots'):,.0f} slots for {new('logical_tokens'):,.0f} tokens",
        f"{new('compressions'):,.0f} compressions in {new('seconds'):.2f} s",
    ]
    if new("hit_tokens"):
        parts.append(f"{new('hit_tokens'):,.0f} of {new('prompt_tokens'):,.0f} prompt tokens found compressed")
    if new("pressure_merges"):
        parts.append(f"{new('pressure_tokens'):,.0f} cold tokens merged in {new('pressure_seconds'):.2f} s")
    if originals := new("unpacked_tokens") + new("streamed_tokens"):
        parts.append(f"{originals:,.0f} tokens read as originals")
    if new("retractions_published"):
        parts.append(f"{new('retractions_published'):,.0f} retractions")
    return parts
