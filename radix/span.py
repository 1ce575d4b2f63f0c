"""One compressed span, and the hashed index of spans below a parent.

A span is atomic: a slot of it holds information of all its tokens, so showing it to a request that shares
only some of them would leak one prompt into another. Hence a child is found by *all* its tokens, and by those behind
it that had a say in what it keeps (`seen`), a long one by their hash, and what a match returns is confirmed token by
token; a hash only ever saves work, it never decides.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

HEAD_TOKENS = 32
"""Children are grouped by this many first tokens: all unrelated branches together cost one lookup."""

MANY_LENGTHS = 32
"""From so many lengths on, their hashes are computed by numpy at once."""

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


class ChildIndex:
    """Spans below one parent. No two have seen the same tokens.

    "Tokens" here are those of `Span.seen`. A span of up to HEAD_TOKENS tokens is found by these tokens: token count ->
    token bytes -> span. A longer one by its first HEAD_TOKENS tokens, then its token count, then its hash: head bytes
    -> token count -> hash -> spans. So a lookup tries a bounded number of short lengths, and then only the distinct
    lengths of the children that begin like the key.
    """

    __slots__ = ("_long", "_short", "_size")

    def __init__(self) -> None:
        self._short: dict[int, dict[bytes, Span]] = {}
        self._long: dict[bytes, dict[int, dict[int, list[Span]]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Span]:
        for spans_of_length in self._short.values():
            yield from spans_of_length.values()
        for lengths in self._long.values():
            for hashes in lengths.values():
                for spans in hashes.values():
                    yield from spans

    def add(self, span: Span) -> None:
        """Adds a span that has seen what no child has."""
        if len(span.seen) <= HEAD_TOKENS:
            self._short.setdefault(len(span.seen), {})[span.seen.tobytes()] = span
        else:
            span.hash = KeyHash(span.seen).of(0, len(span.seen))
            lengths = self._long.setdefault(span.seen[:HEAD_TOKENS].tobytes(), {})
            lengths.setdefault(len(span.seen), {}).setdefault(span.hash, []).append(span)
        self._size += 1

    def discard(self, span: Span) -> None:
        """Removes a span that is in the index (KeyError or ValueError otherwise) and levels left empty."""
        if len(span.seen) <= HEAD_TOKENS:
            del self._short[len(span.seen)][span.seen.tobytes()]
            if not self._short[len(span.seen)]:
                del self._short[len(span.seen)]
        else:
            head = span.seen[:HEAD_TOKENS].tobytes()
            lengths = self._long[head]
            hashes = lengths[len(span.seen)]
            hashes[span.hash].remove(span)
            if not hashes[span.hash]:
                del hashes[span.hash]
            if not hashes:
                del lengths[len(span.seen)]
            if not lengths:
                del self._long[head]
        self._size -= 1

    def candidates(self, tokens: array[int], key: KeyHash, start: int, end: int) -> list[Span]:
        """Every child that has seen tokens[start:start + len(child.seen)], with start + len(child.seen) <= end.

        And, where hashes collide, some of more than HEAD_TOKENS tokens that only look so: see `Span.follows`.
        """
        room = end - start
        found = []
        for n, spans in self._short.items():
            if n <= room and (span := spans.get(tokens[start : start + n].tobytes())) is not None:
                found.append(span)
        if self._long and room > HEAD_TOKENS:
            lengths = self._long.get(tokens[start : start + HEAD_TOKENS].tobytes())
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

    def exact(self, tokens: array[int]) -> Span | None:
        """The child that has seen exactly these tokens, or None."""
        n = len(tokens)
        if n <= HEAD_TOKENS:
            return self._short.get(n, {}).get(tokens.tobytes())
        hashes = self._long.get(tokens[:HEAD_TOKENS].tobytes(), {}).get(n)
        for span in hashes.get(KeyHash(tokens).of(0, n), ()) if hashes else ():
            if span.seen == tokens:
                return span
        return None


class Span:
    """n tokens kept in m KV slots, below a parent span or directly below an anchor of SGLang's tree.

    All read its fields, SpanTree alone writes them, except `slots` and `meta`, which are the adapter's.

    parent, anchor, anchor_len, namespace  where it hangs; the anchor is P uncompressed tokens, None if P == 0
    tokens      array('q') of its own n tokens
    seen        array('q'): its tokens and the `lookahead` tokens behind them whose queries chose what it keeps; a key
                that differs in any of these does not match, although only the n belong to the span
    slots       opaque to the tree (the adapter keeps an int64 tensor of m slot ids)
    raw         one slot per token (n == m): the uncompressed tail of a chain
    meta        opaque to the tree (the adapter's accounting)
    lock_ref    requests that use it or a span below it
    created     logical time (SpanTree.tick) of its insertion, last_access: of its last use
    hits        1 for its insertion, 1 for each match since, 1 for each time it was inserted again
    dead        True once removed; a dead span never matches and owns nothing
    path_tokens P + the n of its chain, path_slots: P + the m of its chain
    serial      its number, so that ties are the same on every tensor-parallel rank
    queued      key of its newest entry in the eviction heap, None without one
    """

    __slots__ = (
        "anchor", "anchor_len", "children", "created", "dead", "hash", "hits", "last_access", "lock_ref", "m",
        "meta", "n", "namespace", "parent", "path_slots", "path_tokens", "queued", "raw", "seen", "serial", "slots",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        *,
        parent: Span | None,
        anchor: Hashable | None,
        anchor_len: int,
        namespace: Hashable,
        tokens: array[int],
        lookahead: array[int] | None = None,
        slots: Any,
        m: int,
        raw: bool,
        meta: Any,
        serial: int,
    ) -> None:
        self.parent, self.anchor, self.anchor_len, self.namespace = parent, anchor, anchor_len, namespace
        self.tokens, self.slots, self.meta = tokens, slots, meta
        self.seen = tokens + lookahead if lookahead else tokens
        self.n, self.m, self.raw = len(tokens), m, raw
        self.lock_ref, self.dead, self.serial = 0, False, serial
        self.created, self.last_access, self.hits = 0, 0, 1
        self.children: ChildIndex | None = None  # made with the first child: most spans never have one
        self.hash = 0  # ChildIndex's, of a long span
        self.queued: Any = None
        self.path_tokens: int = self.n + (parent.path_tokens if parent else anchor_len)
        self.path_slots: int = m + (parent.path_slots if parent else anchor_len)

    @property
    def offset(self) -> int:
        """Logical minus physical length at its end: what to add to positions of a row that continues here."""
        return self.path_tokens - self.path_slots

    @property
    def lookahead(self) -> int:
        """Tokens behind its own that a key must have, too."""
        return len(self.seen) - self.n

    @property
    def evictable(self) -> bool:
        """Live, unlocked and childless: the tree may remove it."""
        return not self.dead and not self.lock_ref and not self.children

    def chain(self) -> Iterator[Span]:
        """Itself, its parent, ... up to the span that hangs directly below the anchor."""
        span: Span | None = self
        while span is not None:
            yield span
            span = span.parent

    def path(self) -> list[Span]:
        """The chain from the top down, in the order of its slots in a row."""
        return list(self.chain())[::-1]

    def follows(self, tokens: array[int]) -> bool:
        """Whether tokens[P:] really begins with what the chain has seen, token by token: O(path_tokens - P)."""
        end = self.path_tokens
        for link in self.chain():
            start = end - link.n
            if link.seen != tokens[start : start + len(link.seen)]:
                return False
            end = start
        return True

    def __repr__(self) -> str:
        where = f"anchor={self.anchor!r}+{self.anchor_len}" if self.parent is None else f"parent=#{self.parent.serial}"
        state = "dead" if self.dead else f"lock={self.lock_ref} t={self.last_access}"
        return f"<Span #{self.serial} {where} n={self.n} m={self.m}{' raw' if self.raw else ''} {state}>"


def children_first(tops: Iterable[Span]) -> list[Span]:
    """All spans of the subtrees below and including `tops`, every child before its parent."""
    order, stack = [], list(tops)
    while stack:
        span = stack.pop()
        order.append(span)
        stack.extend(span.children or ())
    return order[::-1]
