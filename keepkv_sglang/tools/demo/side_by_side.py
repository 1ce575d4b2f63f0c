"""Two answers beside each other, and where they part."""

from __future__ import annotations

import textwrap
from itertools import takewhile, zip_longest

WIDTH = 57
GAP = "   "


def columns(left: str, right: str, width: int = WIDTH, lines: int = 6) -> str:
    """Both texts wrapped to `width` characters, side by side, at most so many lines of each."""
    wrapped = [_wrapped(text, width, lines) for text in (left, right)]
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join(f"{a:{width}}{GAP}{b}".rstrip() for a, b in rows)


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" ...") or ["(nothing)"]


def common_words(left: str, right: str) -> int | None:
    """How many words both begin with; None when they are the same, word for word."""
    a, b = left.split(), right.split()
    if a == b:
        return None
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def parting(left: str, right: str) -> str:
    """One line: the same answer, or the words at which the two part."""
    count = common_words(left, right)
    if count is None:
        return "= the same answer, word for word"
    before = " ".join(left.split()[max(0, count - 4) : count])
    a, b = (" ".join(text.split()[count : count + 4]) or "(the end)" for text in (left, right))
    where = f'after {count} words, "... {before}"' if count else "from the first word"
    return f'≠ they part {where}: "{a}" | "{b}"'
