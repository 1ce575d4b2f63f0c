"""Hashes of any part of a key, each in O(1)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse mod 2^64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)


class _Powers:
    """base^0, base^1, ... mod 2^64 in one numpy array that doubles when a longer key arrives."""

    def __init__(self, base: int) -> None:
        self._base = base
        self._table: npt.NDArray[np.uint64] = np.ones(1, dtype=np.uint64)

    def upto(self, count: int) -> npt.NDArray[np.uint64]:
        """uint64 array of at least `count` powers."""
        while len(self._table) < count:
            step = np.uint64(pow(self._base, len(self._table), 1 << 64))
            self._table = np.concatenate((self._table, self._table * step))
        return self._table


_POWERS = _Powers(_BASE)
_INVERSE_POWERS = _Powers(_BASE_INVERSE)


def as_tokens(tokens: Sequence[int]) -> array[int]:
    """`tokens` as array('q'), the same object if it already is one (slices of those compare like memcmp)."""
    if isinstance(tokens, array) and tokens.typecode == "q":
        return tokens
    return array("q", tokens)


class KeyHash:
    """Hashes of any substring of one key, each in O(1) after a prefix sum.

    prefix[i] = sum_{j<i} token[j] * base^j  (mod 2^64), and
    hash(start, count) = (prefix[start + count] - prefix[start]) * base^-start, a function of the tokens only.

    The prefix sum is extended on demand (doubling), so a match costs the length it looked at, not the key's.
    Arithmetic mod 2^64 admits crafted collisions; they cost one comparison each and never a wrong match.
    """

    __slots__ = ("_done", "_inverses", "_prefix", "_tokens")

    def __init__(self, tokens: array[int]) -> None:
        self._tokens = tokens
        # Memory views, because reading one number of them is twice as fast as of an array of numpy.
        self._prefix = _NO_SUMS
        self._inverses = _NO_SUMS
        self._done = 0

    def of(self, start: int, count: int) -> int:
        """Hash of tokens[start:start + count]."""
        end = start + count
        if end > self._done:
            self._extend(end)
        return (self._prefix[end] - self._prefix[start]) * self._inverses[start] & _MASK

    def of_all(self, start: int, counts: npt.NDArray[np.int64]) -> list[int]:
        """[of(start, count) for count in counts], a few times faster."""
        self.of(start, int(counts.max()))
        ends = np.asarray(self._prefix)[counts + start]
        hashes: list[int] = ((ends - np.uint64(self._prefix[start])) * np.uint64(self._inverses[start])).tolist()
        return hashes

    def _extend(self, end: int) -> None:
        done, total = self._done, len(self._tokens)
        end = min(total, max(end, 2 * done, 256))
        prefix = np.empty(end + 1, dtype=np.uint64)
        prefix[: done + 1] = self._prefix
        # The view lives only here: while one exists, the caller's array could not be resized.
        new = np.frombuffer(self._tokens, dtype=np.uint64)[done:end] * _POWERS.upto(end)[done:end]
        np.cumsum(new, out=prefix[done + 1 :])
        prefix[done + 1 :] += prefix[done]
        self._prefix = prefix.data
        self._inverses = _INVERSE_POWERS.upto(end + 1).data
        self._done = end


_NO_SUMS = np.zeros(1, dtype=np.uint64).data
