"""Eviction orders: what --radix-eviction-policy means for spans, and for SGLang's nodes beside them; their heap.

The smallest key goes first. A span and a `Usage` have the same three fields, so their keys compare: one order
over both trees. Formulas as in SGLang 0.5.23 (srt/mem_cache/evict_policy.py), on a logical clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .span import Span


class Used(Protocol):
    """What an order looks at; created and last_access are times of SpanTree.tick()."""

    @property
    def created(self) -> int: ...

    @property
    def last_access(self) -> int: ...

    @property
    def hits(self) -> int: ...


@dataclass(slots=True)
class Usage:
    """The same record for something that is no span: the adapter keeps one per node of SGLang's tree.

    hits counts as SGLang's hit_count does: 1 when it is made, 1 for each later request that passes over it.
    """

    created: int = 0
    last_access: int = 0
    hits: int = 0


Order = Callable[[Used], Any]

ORDERS: dict[str, Order] = {
    "lru": lambda use: use.last_access,
    "lfu": lambda use: (use.hits, use.last_access),
    "fifo": lambda use: use.created,
    "slru": lambda use: (use.hits >= 2, use.last_access),
    "mru": lambda use: -use.last_access,
    "filo": lambda use: -use.created,
}
AS_LRU = ("priority", "tlru")
"""priority sorts by the requests' priority, tlru by what a conversation may lose within its time to first
token. Spans know neither, so both become lru."""


def order_of(policy: str) -> Order:
    """The key of a policy by SGLang's name for it, in any case; ValueError if there is none of that name."""
    name = policy.lower()
    if name in AS_LRU:
        name = "lru"
    if name not in ORDERS:
        raise ValueError(f"no eviction policy {policy!r}: choose one of {', '.join([*ORDERS, *AS_LRU])}")
    return ORDERS[name]


class EvictionHeap:
    """The unlocked childless spans, the next to go first. Nothing scans: O(log n) amortised for all it does.

    entries: (key, serial, span). The entry with the key `span.queued` counts, others of that span are leftovers. Its
    key is never above the span's own: keys of most orders only grow, and one that shrinks (mru) is queued anew. So
    `first` pushes down an entry that lags, and drops one whose span is locked or a parent; `add` brings it back.
    """

    def __init__(self, key: Order) -> None:
        self.key = key
        self.entries: list[tuple[Any, int, Span]] = []
        self._counting = 0

    def add(self, span: Span) -> None:
        """Call it when a span may have become evictable, or was used: enters it if no entry is low enough."""
        if not span.evictable:
            return
        key = self.key(span)
        if span.queued is None or key < span.queued:
            self._counting += span.queued is None
            span.queued = key
            heapq.heappush(self.entries, (key, span.serial, span))
            self._sweep()

    def first(self) -> Span | None:
        """The evictable span with the smallest key; a peek."""
        entries = self.entries
        while entries:
            key, serial, span = entries[0]
            if key != span.queued:
                heapq.heappop(entries)
            elif not span.evictable:
                heapq.heappop(entries)
                span.queued = None
                self._counting -= 1
            elif key != (now := self.key(span)):
                span.queued = now
                heapq.heapreplace(entries, (now, serial, span))
            else:
                return span
        return None

    def discard(self, span: Span) -> None:
        """Its entry, if any, becomes a leftover."""
        self._counting -= span.queued is not None
        span.queued = None
        self._sweep()

    def _sweep(self) -> None:
        """Once most entries are leftovers, lets them go: they keep dead spans alive."""
        if len(self.entries) > 2 * self._counting + 64:
            self.entries = [entry for entry in self.entries if entry[0] == entry[2].queued]
            heapq.heapify(self.entries)
