"""Sizes and eviction over both trees: one order, uncompressed copies of compressed prefixes first.

SGLang's cache walks its own tree for victims; here spans that are due earlier go before each victim. Nothing merges
here: eviction runs when slots are needed at once.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from keepkv_sglang.radix.events import SpanEvents
from keepkv_sglang.radix.nodes import NodeBook
from keepkv_sglang.radix.order import Usage
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

FULL = ComponentType.FULL
MOST_IN_USE = 32  # covered nodes looked at per eviction that turn out to be in use

Tracker = dict[ComponentType, int]  # slots freed so far


class JointEviction(UnifiedRadixCache):
    """The half of KeepKVRadixCache that gives slots back.

    covered: NodeId -> a span that holds the node's tokens too.
    """

    spans: SpanTree
    nodes: NodeBook
    events: SpanEvents | None
    covered: dict[int, Span]
    raw_spans: dict[int, Span]
    namespaces: dict[Any, dict[tuple[Any, ...], int]]
    evict_goal: tuple[int, int | None, Any] | None  # slots asked for, free slots wanted, or SGLang's own test

    # -- sizes --------------------------------------------------------------------------------------------------------

    def evictable_size(self) -> int:
        return super().evictable_size() + self.spans.evictable_slots

    def full_evictable_size(self) -> int:
        return super().full_evictable_size() + self.spans.evictable_slots

    def protected_size(self) -> int:
        return super().protected_size() + self.spans.protected_slots

    def full_protected_size(self) -> int:
        return super().full_protected_size() + self.spans.protected_slots

    # -- one thing at a time ------------------------------------------------------------------------------------------

    def path_of(self, node_id: int) -> tuple[Any, ...]:
        """SGLang's TreePathNodeInfo of every node from the root's child down to node_id."""
        return self.tree_core.collect_path_info([node_id])[0]

    def evictable_leaf(self, node_id: int) -> bool:
        """Whether this node of SGLang's tree may be evicted now. SGLang's core panics when asked for another."""
        if self.nodes.get(node_id) is None or self.nodes.locked(node_id):
            return False
        return not self.path_of(node_id)[-1].num_children

    def evict_node(self, node_id: int, tracker: Tracker) -> Any:
        """Evicts a leaf of SGLang's tree with its spans, whatever its age. The node above may be a leaf then."""
        path = self.path_of(node_id)
        result = super()._evict_device_leaf(node_id, tracker)
        if self.spans.has_anchor(node_id):
            self.drop_spans(self.spans.drop_anchor(node_id), tracker)
        self.nodes.forget(node_id)
        self.covered.pop(node_id, None)
        if len(path) > 1:
            self.nodes.put_back(path[-2].node_id)
        return result

    def drop_spans(self, dead: list[Span], tracker: Tracker) -> None:
        """Frees the slots of spans that the tree gave back; one call, since the allocator copies its list each time."""
        if not dead:
            return
        self.token_to_kv_pool_allocator.free(torch.cat([span.slots for span in dead]))
        tracker[FULL] += sum(span.m for span in dead)
        for span in dead:
            self.raw_spans.pop(span.serial, None)
            self.count_span(span.namespace, -1)
            if self.events is not None:
                self.events.removed(span)

    def count_span(self, namespace: Any, change: int) -> None:
        """Keeps `namespaces`: a configuration without spans is forgotten."""
        scope = namespace[:3]
        counts = self.namespaces.setdefault(scope, {})
        counts[namespace] = counts.get(namespace, 0) + change
        if not counts[namespace]:
            del counts[namespace]
        if not counts:
            del self.namespaces[scope]

    # -- until the goal is reached ------------------------------------------------------------------------------------

    def evict_slots(self, count: int) -> None:
        """Makes room: drops the next in line of both trees until `count` slots came free, or nothing is left."""
        self.evict(EvictParams(num_tokens=count))

    def _missing(self, tracker: Tracker) -> int:
        """Slots still to be freed; 1 where SGLang only says whether it is satisfied."""
        assert self.evict_goal is not None
        count, available, satisfied = self.evict_goal
        if satisfied is not None:
            return int(not satisfied())
        if available is not None:
            return max(0, available - self._component_available_size(FULL))
        return max(0, count - tracker[FULL])

    def _evict_components(
        self,
        request_by_type: Any,
        tracker: Any,
        available_size_targets: Any = None,
        *,
        allocation_reclaim_satisfied: Any = None,
    ) -> None:
        count = request_by_type[FULL]
        target = (available_size_targets or {}).get(FULL)
        self.evict_goal = (count, target[1] if target else None, allocation_reclaim_satisfied)
        try:
            if count > 0:
                self._evict_covered(tracker)
            super()._evict_components(
                request_by_type,
                tracker,
                available_size_targets,
                allocation_reclaim_satisfied=allocation_reclaim_satisfied,
            )
            if count > 0:  # SGLang's tree has no victim left, but spans may: below locked anchors, or without any
                self._evict_spans(tracker)
        finally:
            self.evict_goal = None

    def _evict_covered(self, tracker: Tracker) -> None:
        """Uncompressed copies of what spans hold go first; plain LRU would give up other requests' entries for them."""
        in_use: dict[int, Span] = {}
        while self.covered and len(in_use) < MOST_IN_USE and self._missing(tracker):
            node_id, entry = self.covered.popitem()
            if entry.dead or self.nodes.get(node_id) is None or self.spans.has_anchor(node_id):
                continue  # no longer true, or needed as an anchor
            if self.evictable_leaf(node_id):
                self.evict_node(node_id, tracker)
            else:
                in_use[node_id] = entry
        self.covered.update(reversed(in_use.items()))

    def _evict_spans(self, tracker: Tracker, until: Any = None) -> None:
        """Drops spans in order, until the goal is reached or the next one's key is above `until`."""
        while missing := self._missing(tracker):
            dead: list[Span] = []
            while missing > 0 and (span := self.spans.oldest()) is not None:
                if until is not None and self.spans.key(span) > until:
                    break
                self.spans.remove(span)
                dead.append(span)
                missing -= span.m
            if not dead:
                return
            self.drop_spans(dead, tracker)

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        """SGLang's victim: spans due before it go first; if they suffice it is spared."""
        node = self.nodes.get(node_id)
        self._evict_spans(tracker, until=self.spans.key(node.usage if node is not None else Usage()))
        if not self._missing(tracker):
            return None
        return self.evict_node(node_id, tracker)
