"""`protect` and `fair` as text: tokens that a client wants kept whole, and ranges of which each gets its share.

Both are text, since SGLang's custom_params hold scalars only: "system", "0-500,900-950", "system,900-950". A range is
half-open, start-end, in logical positions: tokens counted from the beginning of the prompt, chat template included. The
reply continues the count, so a range may lie in a reply, or further on: it holds from the turn that reaches it.

What the ranges do to a turn is turn/protection.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

from keepkv_sglang.settings.values import shown

SYSTEM = "system"
MAX_RANGES = 64
MAX_POSITION = 1 << 28

Range = tuple[int, int]


def parse_protect(value: Any) -> str:
    """The canonical text: "system" first, ranges ascending, adjacent ones joined. ValueError says what to do."""
    words, ranges = _read("protect", value)
    return _text(words, union(ranges))


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
                f"{name}: {part} is empty or too far out; use an end that is larger than the start (it is the first "
                f"token that is not in the range) and at most {MAX_POSITION}"
            )
        ranges.append((start, end))
    ranges.sort()
    for (a, b), (c, d) in itertools.pairwise(ranges):
        if c < b:
            raise ValueError(f"{name}: {a}-{b} and {c}-{d} overlap; name every token once")
    return words, ranges


def _text(words: list[str], ranges: Iterable[Range]) -> str:
    return ",".join([*words, *(f"{start}-{end}" for start, end in ranges)])


def ranges_of(text: str) -> list[Range]:
    """The ranges of a canonical text."""
    parts = (part.split("-") for part in text.split(",") if part not in ("", SYSTEM))
    return [(int(start), int(end)) for start, end in parts]


def union(ranges: Iterable[Range]) -> list[Range]:
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
