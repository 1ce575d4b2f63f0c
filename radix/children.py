"""The hashed index of the spans below one parent."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np

from .keyhash import KeyHash

WORD = 8
"""Bytes of a token."""

HEAD_TOKENS = 32
"""Children are grouped by this many first tokens: all unrelated branches together cost one lookup."""

HEAD = HEAD_TOKENS * WORD

MANY_LENGTHS = 32
"""From so many lengths on, their hashes are computed by numpy at once."""

FEW = 4
"""Up to so many children are compared one by one: cheaper than any lookup, and most spans have one or two."""


class Entry(Protocol):
    """What the index reads of a span (span.py), and the hash that it keeps there."""

    data: bytes
    borders: list[int]
    hash: int

    @property
    def seen(self) -> array[int]: ...


E = TypeVar("E", bound=Entry)


class ChildIndex(Generic[E]):
    """Spans below one parent. No two have seen the same tokens.

    "Tokens" here are those of `Span.seen`, as bytes. Of more than a few children, one of up to HEAD_TOKENS tokens is
    found by these tokens: token count -> token bytes -> span. A longer one by its first HEAD_TOKENS tokens, then its
    token count, then its hash: head bytes -> token count -> hash -> spans. So a lookup tries a bounded number of short
    lengths, and then only the distinct lengths of the children that begin like the key.

    A joined span is also found by its first tokens up to each of its borders: token count -> token bytes -> span. No
    border of one is where another child ends, or has a border.

    few       all children, while there are few, else None
    borders   those of joined spans, None if there are none
    """

    __slots__ = ("_long", "_short", "_size", "borders", "few")

    def __init__(self) -> None:
        self.few: tuple[E, ...] | None = ()
        self._short: dict[int, dict[bytes, E]] = {}
        self._long: dict[bytes, dict[int, dict[int, list[E]]]] = {}
        self._size = 0
        self.borders: dict[int, dict[bytes, E]] | None = None

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[E]:
        if self.few is not None:
            yield from self.few
        for spans_of_length in self._short.values():
            yield from spans_of_length.values()
        for lengths in self._long.values():
            for hashes in lengths.values():
                for spans in hashes.values():
                    yield from spans

    def add(self, span: E) -> None:
        """Adds a span that has seen what no child has."""
        self._size += 1
        if self.few is None:
            self._enter(span)
        elif len(self.few) < FEW:
            self.few = (*self.few, span)
        else:
            spans, self.few = (*self.few, span), None
            for child in spans:
                self._enter(child)
        for at in span.borders:
            if self.borders is None:
                self.borders = {}
            self.borders.setdefault(at, {})[span.data[: at * WORD]] = span

    def discard(self, span: E) -> None:
        """Removes a span that is in the index (KeyError or ValueError otherwise) and levels left empty."""
        if self.few is not None:
            at = self.few.index(span)
            self.few = self.few[:at] + self.few[at + 1 :]
        else:
            self._leave(span)
        self._size -= 1
        if self.few is None and self._size <= FEW // 2:  # so that one span that comes and goes moves no others
            few = tuple(self)
            for child in few:
                self._leave(child)
            self.few = few
        for at in span.borders:
            assert self.borders is not None
            del self.borders[at][span.data[: at * WORD]]
            if not self.borders[at]:
                del self.borders[at]
        self.borders = self.borders or None

    def _enter(self, span: E) -> None:
        n = len(span.data) // WORD
        if n <= HEAD_TOKENS:
            self._short.setdefault(n, {})[span.data] = span
        else:
            span.hash = KeyHash(span.seen).of(0, n)
            lengths = self._long.setdefault(span.data[:HEAD], {})
            lengths.setdefault(n, {}).setdefault(span.hash, []).append(span)

    def _leave(self, span: E) -> None:
        n = len(span.data) // WORD
        if n <= HEAD_TOKENS:
            del self._short[n][span.data]
            if not self._short[n]:
                del self._short[n]
        else:
            lengths = self._long[span.data[:HEAD]]
            hashes = lengths[n]
            hashes[span.hash].remove(span)
            if not hashes[span.hash]:
                del hashes[span.hash]
            if not hashes:
                del lengths[n]
            if not lengths:
                del self._long[span.data[:HEAD]]

    def candidates(self, data: bytes, key: KeyHash, start: int) -> list[E]:
        """Every child that has seen the tokens from `start` on of `data`, whose hashes are `key`'s.

        And, where hashes collide, some of more than HEAD_TOKENS tokens that only look so. Not for a few children.
        """
        at, room = start * WORD, len(data) // WORD - start
        found = []
        for n, spans in self._short.items():
            if n <= room and (span := spans.get(data[at : at + n * WORD])) is not None:
                found.append(span)
        if self._long and room > HEAD_TOKENS:
            lengths = self._long.get(data[at : at + HEAD])
            if lengths is None:
                return found
            if len(lengths) < MANY_LENGTHS:
                for n, hashes in lengths.items():
                    if n <= room:
                        found += hashes.get(key.of(start, n), ())
                return found
            counts = np.fromiter(lengths, dtype=np.int64, count=len(lengths))
            counts = counts[counts <= room]
            if len(counts):
                for n, hash in zip(counts.tolist(), key.of_all(start, counts), strict=True):
                    found += lengths[n].get(hash, ())
        return found

    def exact(self, data: bytes) -> E | None:
        """The child that has seen exactly these tokens, or None."""
        if self.few is not None:
            return next((span for span in self.few if span.data == data), None)
        n = len(data) // WORD
        if n <= HEAD_TOKENS:
            return self._short.get(n, {}).get(data)
        hashes = self._long.get(data[:HEAD], {}).get(n)
        for span in hashes.get(KeyHash(array("q", data)).of(0, n), ()) if hashes else ():
            if span.data == data:
                return span
        return None

    def joined(self, data: bytes) -> E | None:
        """The joined child that has a border right behind exactly these tokens, or None."""
        return self.borders.get(len(data) // WORD, {}).get(data) if self.borders is not None else None
