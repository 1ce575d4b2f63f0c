"""Marks of protected tokens in a span's key: high bits of its token ids.

Two requests may share a span if they agree on what is marked *in it*, whatever they marked elsewhere. So the marks are
not part of the namespace but of the tokens: an entry of another protection is simply one of other tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

WHOLE_MARK = 1 << 32  # above every token id
FAIR_SHIFT = 33  # a fair token is marked with where its range begins, plus 1: below 2^62

Range = tuple[int, int]  # half-open, in logical positions


def mark(tokens: array[int], whole: Iterable[Range], fair: Iterable[Range]) -> array[int]:
    """A copy of `tokens`, which begin at position 0, with the marks of both kinds of ranges."""
    keyed = array("q", tokens)
    view = np.frombuffer(keyed, dtype=np.int64)
    for start, end in whole:
        view[start:end] |= WHOLE_MARK
    for start, end in fair:
        view[start:end] |= (start + 1) << FAIR_SHIFT
    del view  # while it lives, the array could not be resized
    return keyed


def marked(tokens: array[int]) -> bool:
    """Whether any token of a key carries a mark."""
    return bool(len(tokens)) and int(np.frombuffer(tokens, dtype=np.int64).max()) >= WHOLE_MARK


def whole_in(tokens: array[int]) -> list[int]:
    """Indices of the tokens of a key that are protected whole, ascending."""
    if not marked(tokens):
        return []
    return np.flatnonzero(np.frombuffer(tokens, dtype=np.int64) & WHOLE_MARK).tolist()


def plain(tokens: array[int]) -> array[int]:
    """Token ids of a key, without marks: the same array when there are none."""
    if not marked(tokens):
        return tokens
    return array("q", (np.frombuffer(tokens, dtype=np.int64) & (WHOLE_MARK - 1)).tobytes())
