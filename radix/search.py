"""The longest chain of spans that a key begins with."""

from __future__ import annotations

from array import array

from .children import WORD, ChildIndex
from .keyhash import KeyHash
from .span import JOINED_TOKENS, Span

LONG = 1024
"""Bytes from which on a comparison without a copy is cheaper."""


def longest(starts: list[tuple[int, ChildIndex[Span]]], tokens: array[int], end: int) -> tuple[Span | None, int]:
    """What SpanTree.match() returns as (span, 0), or (joined span, border) for the part before a border of it.

    Whatever is followed has been compared token by token. The branch that reaches furthest is followed first: most
    others cannot reach as far any more, and are left alone.
    """
    data, key = memoryview(tokens)[: max(end, 0)].tobytes(), KeyHash(tokens)
    is_next = data.startswith
    best: Span | None = None
    most = 0  # tokens of the best
    tops = list(starts)
    pending: list[Span] = []  # other branches, not compared yet
    joined: list[tuple[int, ChildIndex[Span]]] = []
    last: Span | None
    index: ChildIndex[Span] | None
    while tops or pending:
        if tops:
            start, index = tops.pop()
            last = None
        else:
            last = pending.pop()
            if last.reach < most or not is_next(last.data, (last.path_tokens - last.n) * WORD):
                continue
            start, index = last.path_tokens, last.children
        while index is not None:
            if index.borders is not None:
                joined.append((start, index))
            if index.few is None:
                pending += sorted(index.candidates(data, key, start), key=_reach)
                break
            span: Span | None = None
            at = start * WORD
            for other in index.few:
                seen = other.data
                size = len(seen)  # a copy of a few tokens takes half the time of startswith
                if (data[at : at + size] != seen) if size < LONG else not is_next(seen, at):
                    continue
                if span is None:
                    span = other
                elif other.reach > span.reach:
                    pending.append(span)
                    span = other
                else:
                    pending.append(other)
            if span is None:
                break
            last, start, index = span, start + span.n, span.children  # path_tokens would be one more place to read
        if last is not None and last.path_tokens >= most:
            if best is None or last.path_tokens > most or _rank(last, 0) > _rank(best, 0):
                best = last
            most = last.path_tokens
    return _border(joined, data, best)


def _border(joined: list[tuple[int, ChildIndex[Span]]], data: bytes, best: Span | None) -> tuple[Span | None, int]:
    """The best of `best` and the borders of joined spans. joined: (where it begins, index with borders) on the way."""
    most, cut = best.path_tokens if best is not None else 0, 0
    for start, index in joined:
        if start + JOINED_TOKENS <= most:
            continue  # no border that far
        for at, spans in (index.borders or {}).items():
            stop = start + at
            if stop < most or (span := spans.get(data[start * WORD : stop * WORD])) is None:
                continue
            if best is None or stop > most or _rank(span, at) > _rank(best, cut):
                best, most, cut = span, stop, at
    return best, cut


def _reach(span: Span) -> int:
    return span.reach


def _rank(span: Span, at: int) -> tuple[int, int, bool, int]:
    """What match() prefers among equally long ones, most important first. A part counts as the youngest of spans."""
    less = span.n - at if at else 0  # as many slots, since it is raw
    return span.anchor_len, span.path_slots - less, not at, -span.serial
