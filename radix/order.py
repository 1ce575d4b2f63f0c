"""Eviction orders: what --radix-eviction-policy means for spans, and for SGLang's nodes beside them.

The smallest key goes first. A span and a `Usage` have the same three fields, so their keys compare: one order
over both trees. Formulas as in SGLang 0.5.23 (srt/mem_cache/evict_policy.py), on a logical clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


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
