"""One order of eviction over both trees: spans that are due earlier go before each victim of SGLang's own.

Nothing merges here: eviction runs when slots are needed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from keepkv_sglang.radix.nodes import NodeBook
from keepkv_sglang.radix.order import Usage
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

FULL = ComponentType.FULL

Tracker = dict[ComponentType, int]  # slots freed so far


class Goal:
    """What one eviction is after: `count` slots freed, `available` free ones, or SGLang's own test."""

    def __init__(
        self, count: int, available: int | None, satisfied: Callable[[], bool] | None, free: Callable[[], int]
    ) -> None:
        self._count, self._available, self._satisfied, self._free = count, available, satisfied, free

    def missing(self, tracker: Tracker) -> int:
        """Slots still to be freed; 1 where SGLang only says whether it is satisfied."""
        if self._satisfied is not None:
            return int(not self._satisfied())
        if self._available is not None:
            return max(0, self._available - self._free())
        return max(0, self._count - tracker[FULL])


class SpanEviction:
    """Drops spans in their tree's order. drop(spans, tracker): frees their slots, and counts them."""

    def __init__(self, spans: SpanTree, nodes: NodeBook, drop: Callable[[list[Span], Tracker], None]) -> None:
        self._spans, self._nodes, self._drop = spans, nodes, drop

    def run(self, goal: Goal, tracker: Tracker, until: Any = None) -> None:
        """Until the goal is reached, or the next one's key is above `until`."""
        while missing := goal.missing(tracker):
            dead: list[Span] = []
            while missing > 0 and (span := self._spans.oldest()) is not None:
                if until is not None and self._spans.key(span) > until:
                    break
                self._spans.remove(span)
                dead.append(span)
                missing -= span.m
            if not dead:
                return
            self._drop(dead, tracker)

    def before(self, node_id: int, goal: Goal, tracker: Tracker) -> None:
        """Those that are due before a node of SGLang's tree."""
        node = self._nodes.get(node_id)
        self.run(goal, tracker, until=self._spans.key(node.usage if node is not None else Usage()))
