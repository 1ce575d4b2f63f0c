"""What a request marks: `protect` keeps tokens whole, `fair` gives each of several ranges its share.

What is merged under pressure carries no marks, and is found by nobody who marked any of it.

Why: compression drops some of several instructions and leaves others alone ("The Pitfalls of KV Cache Compression",
arXiv 2510.00231, which proposes tokens that are never evicted, and the same retention rate for each instruction).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from keepkv_sglang.radix.marks import mark
from keepkv_sglang.settings.protect import Range, names_system, ranges_of, union
from keepkv_sglang.turn.anchor import MessageBorder, first_message_end


@dataclass(frozen=True)
class Protection:
    """What one request marks, as logical positions. Ranges are half-open, ascending, and apart within each field."""

    whole: tuple[Range, ...] = ()
    fair: tuple[Range, ...] = ()

    @staticmethod
    def of(protect: str, fair: str, tokens: Sequence[int], border: MessageBorder | None) -> Protection:
        """Resolves canonical texts for a prompt. "system" is the first message when a second one follows it, by the
        rule that finds the anchor (anchor.py); without such a border it is nothing."""
        ranges = ranges_of(protect)
        if names_system(protect) and (end := first_message_end(tokens, border)):
            ranges.append((0, end))
        return Protection(tuple(union(ranges)), tuple(ranges_of(fair)))

    def count(self, start: int, end: int) -> int:
        """Whole tokens in [start, end)."""
        return sum(max(0, min(end, b) - max(start, a)) for a, b in self.whole)

    def touches(self, start: int, end: int) -> bool:
        """Whether any token of [start, end) is marked."""
        return any(a < end and start < b for a, b in (*self.whole, *self.fair))

    def whole_in(self, start: int, end: int) -> tuple[Range, ...]:
        """The whole ranges' parts in [start, end), counted from start."""
        return tuple((max(a, start) - start, min(b, end) - start) for a, b in self.whole if a < end and start < b)

    def shares_in(self, start: int, end: int, budget: float) -> tuple[tuple[int, int, int], ...]:
        """(from, to, least) of the fair ranges' parts in [start, end), counted from start: at least
        ceil(budget * tokens) of the part's tokens that are not whole anyway."""
        out = []
        for a, b in self.fair:
            a, b = max(a, start), min(b, end)
            if a < b:
                out.append((a - start, b - start, math.ceil(budget * (b - a - self.count(a, b)) - 1e-9)))
        return tuple(out)

    def keyed(self, tokens: array[int]) -> array[int]:
        """`tokens` (from position 0 on) with their marks: the key under which spans are found. A copy, or `tokens`
        itself when none of them is marked."""
        if not self.touches(0, len(tokens)):
            return tokens
        return mark(tokens, self.whole, self.fair)


UNPROTECTED = Protection()
