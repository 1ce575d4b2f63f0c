"""Tokens that a client wants kept: `protect` keeps them whole, `fair` gives each of several ranges its share.

Both are text, since SGLang's custom_params hold scalars only: "system", "0-500,900-950", "system,900-950". A range is
half-open, start-end, in logical positions: tokens counted from the beginning of the prompt, chat template included. The
reply continues the count, so a range may lie in a reply, or further on: it holds from the turn that reaches it.

Two requests may share a compressed span if they agree on what is marked *in it*, whatever they marked elsewhere. So the
marks are not part of the namespace but of the span's tokens: `keyed` writes them into high bits of the token ids, and
an entry of another protection is simply one of other tokens. What is merged under pressure carries no marks, and is
found by nobody who marked any of it.

Why: compression drops some of several instructions and leaves others alone ("The Pitfalls of KV Cache Compression",
arXiv 2510.00231, which proposes tokens that are never evicted, and the same retention rate for each instruction).
"""

from __future__ import annotations

import itertools
import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keepkv_sglang.anchor import MessageBorder, first_message_end
from keepkv_sglang.values import shown

SYSTEM = "system"
MAX_RANGES = 64
MAX_POSITION = 1 << 28
WHOLE_MARK = 1 << 32  # above every token id
FAIR_SHIFT = 33  # a fair token is marked with where its range begins, plus 1: below 2^62

Range = tuple[int, int]


def parse_protect(value: Any) -> str:
    """The canonical text: "system" first, ranges ascending, adjacent ones joined. ValueError says what to do."""
    words, ranges = _read("protect", value)
    return _text(words, _union(ranges))


def parse_fair(value: Any) -> str:
    """The canonical text: ranges ascending. Adjacent ranges are two instructions, and stay two."""
    words, ranges = _read("fair", value)
    if words:
        raise ValueError(f"fair takes ranges only, such as 100-180,180-260, not {SYSTEM!r}; use protect for that")
    return _text(words, ranges)


def _read(name: str, value: Any) -> tuple[list[str], list[Range]]:
    if not isinstance(value, str):
        example = f'"{SYSTEM},900-950"' if name == "protect" else '"100-180,180-260"'
        raise ValueError(f"{name} {shown(value)} is not text; use a text such as {example}")
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    if len(parts) > MAX_RANGES:
        raise ValueError(f"{name} names {len(parts)} ranges; use at most {MAX_RANGES}: join neighbours")
    words, ranges = [], []
    for part in parts:
        if part == SYSTEM:
            words = [SYSTEM]
            continue
        found = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", part)
        if found is None:
            raise ValueError(
                f"{name}: {part[:60]!r} is not a range; use start-end in tokens of the prompt, such as 900-950"
                + (f", or {SYSTEM!r} for the first message" if name == "protect" else "")
            )
        start, end = int(found[1]), int(found[2])
        if start >= end or end > MAX_POSITION:
            raise ValueError(
                f"{name}: {part} is empty or too far out; the end is the first token that is not in the range, "
                f"so it is larger than the start, and at most {MAX_POSITION}"
            )
        ranges.append((start, end))
    ranges.sort()
    for (a, b), (c, d) in itertools.pairwise(ranges):
        if c < b:
            raise ValueError(f"{name}: {a}-{b} and {c}-{d} overlap; name every token once")
    return words, ranges


def _text(words: list[str], ranges: Iterable[Range]) -> str:
    return ",".join([*words, *(f"{start}-{end}" for start, end in ranges)])


def _ranges(text: str) -> list[Range]:
    """The ranges of a canonical text."""
    parts = (part.split("-") for part in text.split(",") if part not in ("", SYSTEM))
    return [(int(start), int(end)) for start, end in parts]


def _union(ranges: Iterable[Range]) -> list[Range]:
    out: list[Range] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def names_system(protect: str) -> bool:
    """Whether a canonical `protect` asks for the first message."""
    return protect.split(",", 1)[0] == SYSTEM


@dataclass(frozen=True)
class Protection:
    """What one request marks, as logical positions. Ranges are half-open, ascending, and apart within each field."""

    whole: tuple[Range, ...] = ()
    fair: tuple[Range, ...] = ()

    @staticmethod
    def of(protect: str, fair: str, tokens: Sequence[int], border: MessageBorder | None) -> Protection:
        """Resolves canonical texts for a prompt. "system" is the first message when a second one follows it, by the
        rule that finds the anchor (anchor.py); without such a border it is nothing."""
        ranges = _ranges(protect)
        if names_system(protect) and (end := first_message_end(tokens, border)):
            ranges.append((0, end))
        return Protection(tuple(_union(ranges)), tuple(_ranges(fair)))

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
        keyed = array("q", tokens)
        view = np.frombuffer(keyed, dtype=np.int64)
        for start, end in self.whole:
            view[start:end] |= WHOLE_MARK
        for start, end in self.fair:
            view[start:end] |= (start + 1) << FAIR_SHIFT
        del view  # while it lives, the array could not be resized
        return keyed


UNPROTECTED = Protection()


def marked(tokens: array[int]) -> bool:
    """Whether any token of a key carries a mark."""
    return bool(len(tokens)) and int(np.frombuffer(tokens, dtype=np.int64).max()) >= WHOLE_MARK


def plain(tokens: array[int]) -> array[int]:
    """Token ids of a key, without marks: the same array when there are none."""
    if not marked(tokens):
        return tokens
    return array("q", (np.frombuffer(tokens, dtype=np.int64) & (WHOLE_MARK - 1)).tobytes())
