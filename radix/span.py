"""One compressed span.

A span is atomic: a slot of it holds information of all its tokens, so showing it to a request that shares
only some of them would leak one prompt into another. Hence a child is found by *all* its tokens, and by those behind
it that had a say in what it keeps (`seen`), a long one by their hash, and what a match returns is confirmed token by
token; a hash only ever saves work, it never decides.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from .children import WORD, ChildIndex

JOINED_TOKENS = 64
"""Most tokens of a raw span that short ones were joined to."""


class Span:
    """n tokens kept in m KV slots, below a parent span or directly below an anchor of SGLang's tree.

    All read its fields, SpanTree alone writes them, except `slots` and `meta`, which are the adapter's.

    parent, anchor, anchor_len, namespace  where it hangs; the anchor is P uncompressed tokens, None if P == 0
    data        int64 bytes of what it has seen: its n tokens and the `lookahead` tokens behind them whose queries chose
                what it keeps; a key that differs in any of these does not match, although only the n belong to the span
    slots       opaque to the tree (the adapter keeps an int64 tensor of m slot ids)
    raw         one slot per token (n == m): the uncompressed tail of a chain
    borders     of a joined span, counts of its own tokens, ascending: it matches up to each of them, too
    meta        opaque to the tree (the adapter's accounting)
    lock_ref    requests that use it or a span below it
    created     logical time (SpanTree.tick) of its insertion, last_access: of its last use
    hits        1 for its insertion, 1 for each match since, 1 for each time it was inserted again
    dead        True once removed; a dead span never matches and owns nothing
    path_tokens P + the n of its chain, path_slots: P + the m of its chain
    reach       path_tokens of the longest chain through it; where spans below it went, it may be more
    serial      its number, so that ties are the same on every tensor-parallel rank
    queued      key of its newest entry in the eviction heap, None without one
    """

    __slots__ = (
        "anchor", "anchor_len", "borders", "children", "created", "data", "dead", "hash", "hits", "last_access",
        "lock_ref", "m", "meta", "n", "namespace", "parent", "path_slots", "path_tokens", "queued", "raw", "reach",
        "serial", "slots",
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
        self.data, self.slots, self.meta = (tokens + lookahead if lookahead else tokens).tobytes(), slots, meta
        self.n, self.m, self.raw = len(tokens), m, raw
        self.borders: list[int] = []
        self.lock_ref, self.dead, self.serial = 0, False, serial
        self.created, self.last_access, self.hits = 0, 0, 1
        self.children: ChildIndex[Span] | None = None  # made with the first child: most spans never have one
        self.hash = 0  # ChildIndex's, of a long span
        self.queued: Any = None
        self.path_tokens: int = self.n + (parent.path_tokens if parent else anchor_len)
        self.path_slots: int = m + (parent.path_slots if parent else anchor_len)
        self.reach = self.path_tokens

    @property
    def offset(self) -> int:
        """Logical minus physical length at its end: what to add to positions of a row that continues here."""
        return self.path_tokens - self.path_slots

    @property
    def lookahead(self) -> int:
        """Tokens behind its own that a key must have, too."""
        return len(self.data) // WORD - self.n

    @property
    def tokens(self) -> array[int]:
        """array('q') of its own n tokens: a copy."""
        return array("q", self.data[: self.n * WORD])

    @property
    def seen(self) -> array[int]:
        """array('q') of its tokens and its lookahead: a copy."""
        return array("q", self.data)

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
