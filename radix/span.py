"""One compressed span, and the hashed index of spans below a parent.

A span is atomic: a slot of it holds information of all its tokens, so showing it to a request that shares
only some of them would leak one prompt into another. Hence a child is found by the hash of *all* its tokens,
and every hit is confirmed token by token; a hash only ever saves work, it never decides.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

HEAD_TOKENS = 32
"""Children are grouped by the hash of this many first tokens: all unrelated branches cost one lookup."""

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
        self._prefix: npt.NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
        self._inverses = _INVERSE_POWERS.upto(1)
        self._done = 0

    def of(self, start: int, count: int) -> int:
        """Hash of tokens[start:start + count]."""
        end = start + count
        if end > self._done:
            self._extend(end)
        prefix = self._prefix
        difference = int(prefix[end]) - int(prefix[start])
        return difference * int(self._inverses[start]) & _MASK

    def _extend(self, end: int) -> None:
        total = len(self._tokens)
        end = min(total, max(end, 2 * self._done, 256))
        # The view lives only here: while one exists, the caller's array could not be resized.
        new = np.frombuffer(self._tokens, dtype=np.uint64)[self._done : end]
        sums = np.cumsum(new * _POWERS.upto(end)[self._done : end], dtype=np.uint64)
        self._prefix = np.concatenate((self._prefix, sums + self._prefix[-1]))
        self._inverses = _INVERSE_POWERS.upto(end + 1)
        self._done = end


class ChildIndex:
    """Spans below one parent: head length -> head hash -> token count -> full hash -> spans.

    At most HEAD_TOKENS head lengths exist (shorter spans are their own head), so a lookup tries a bounded
    number of heads, and then only the distinct lengths of the children that begin like the key.
    """

    __slots__ = ("_heads", "_size")

    def __init__(self) -> None:
        self._heads: dict[int, dict[int, dict[int, dict[int, list[Span]]]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Span]:
        for groups in self._heads.values():
            for lengths in groups.values():
                for hashes in lengths.values():
                    for spans in hashes.values():
                        yield from spans

    def add(self, span: Span, key: KeyHash) -> None:
        """Adds a span; `key` is the KeyHash of the span's own tokens."""
        head = min(span.n, HEAD_TOKENS)
        span.head_hash, span.full_hash = key.of(0, head), key.of(0, span.n)
        lengths = self._heads.setdefault(head, {}).setdefault(span.head_hash, {})
        lengths.setdefault(span.n, {}).setdefault(span.full_hash, []).append(span)
        self._size += 1

    def discard(self, span: Span) -> None:
        """Removes a span that is in the index (KeyError or ValueError otherwise) and levels left empty."""
        head = min(span.n, HEAD_TOKENS)
        groups = self._heads[head]
        lengths = groups[span.head_hash]
        hashes = lengths[span.n]
        spans = hashes[span.full_hash]
        spans.remove(span)
        self._size -= 1
        if not spans:
            del hashes[span.full_hash]
        if not hashes:
            del lengths[span.n]
        if not lengths:
            del groups[span.head_hash]
        if not groups:
            del self._heads[head]

    def matching(self, tokens: array[int], key: KeyHash, start: int, end: int) -> Iterator[Span]:
        """Every child whose tokens are exactly tokens[start:start + child.n], with start + child.n <= end.

        No two children have the same tokens, so each length yields at most one.
        """
        room = end - start
        for head, groups in self._heads.items():
            if head > room:
                continue
            head_hash = key.of(start, head)
            lengths = groups.get(head_hash)
            if lengths is None:
                continue
            for n, hashes in lengths.items():
                if n > room:
                    continue
                for span in hashes.get(head_hash if n == head else key.of(start, n), ()):
                    if span.tokens == tokens[start : start + n]:
                        yield span
                        break

    def exact(self, tokens: array[int], key: KeyHash) -> Span | None:
        """The child with exactly these tokens, or None."""
        n = len(tokens)
        head = min(n, HEAD_TOKENS)
        lengths = self._heads.get(head, {}).get(key.of(0, head), {})
        for span in lengths.get(n, {}).get(key.of(0, n), ()):
            if span.tokens == tokens:
                return span
        return None


class Span:
    """n tokens kept in m KV slots, below a parent span or directly below an anchor of SGLang's tree.

    All read its fields, SpanTree alone writes them, except `slots` and `meta`, which are the adapter's.

    parent, anchor, anchor_len, namespace  where it hangs; the anchor is P uncompressed tokens, None if P == 0
    tokens      array('q') of its own n tokens
    slots       opaque to the tree (the adapter keeps an int64 tensor of m slot ids)
    raw         one slot per token (n == m): the uncompressed tail of a chain
    meta        opaque to the tree (the adapter's accounting)
    lock_ref    requests that use it or a span below it
    last_access logical time of SpanTree.tick(); only ever grows
    dead        True once removed; a dead span never matches and owns nothing
    path_tokens P + the n of its chain, path_slots: P + the m of its chain
    serial      order of creation, so that ties are the same on every tensor-parallel rank
    """

    __slots__ = (
        "anchor", "anchor_len", "children", "dead", "full_hash", "head_hash", "last_access", "lock_ref", "m",
        "meta", "n", "namespace", "parent", "path_slots", "path_tokens", "queued", "raw", "serial", "slots",
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
        slots: Any,
        m: int,
        raw: bool,
        meta: Any,
        serial: int,
    ) -> None:
        self.parent, self.anchor, self.anchor_len, self.namespace = parent, anchor, anchor_len, namespace
        self.tokens, self.slots, self.meta = tokens, slots, meta
        self.n, self.m, self.raw = len(tokens), m, raw
        self.lock_ref, self.last_access, self.dead, self.serial = 0, 0, False, serial
        self.children: ChildIndex | None = None  # made with the first child: most spans never have one
        self.head_hash = self.full_hash = 0
        self.queued = False  # has an entry in the eviction heap, possibly with an outdated time
        self.path_tokens: int = self.n + (parent.path_tokens if parent else anchor_len)
        self.path_slots: int = m + (parent.path_slots if parent else anchor_len)

    @property
    def offset(self) -> int:
        """Logical minus physical length at its end: what to add to positions of a row that continues here."""
        return self.path_tokens - self.path_slots

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
