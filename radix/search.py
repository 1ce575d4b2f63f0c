"""The longest chain of spans that a key begins with."""

from __future__ import annotations

from array import array

from .span import ChildIndex, KeyHash, Span


def longest(starts: list[tuple[int, ChildIndex]], tokens: array[int], end: int, trust: bool) -> Span | None:
    """What SpanTree.match() returns; it may be wrong where hashes collide, unless trust is False."""
    key = KeyHash(tokens)
    stack = list(starts)
    best: Span | None = None
    while stack:
        start, index = stack.pop()
        for span in index.candidates(tokens, key, start, end):
            stop = span.path_tokens
            if not trust and span.seen != tokens[start : start + len(span.seen)]:
                continue
            if best is None or stop > best.path_tokens or (stop == best.path_tokens and _rank(span) > _rank(best)):
                best = span
            if span.children:
                stack.append((stop, span.children))
    return best


def _rank(span: Span) -> tuple[int, int, int]:
    """What match() prefers among equally long ones, most important first."""
    return span.anchor_len, span.path_slots, -span.serial
