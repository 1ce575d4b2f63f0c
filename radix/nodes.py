"""What we remember of the nodes of SGLang's tree: that tree tells neither their tokens nor which of them is cold.

A node is known by its id: a split keeps the lower part's id and gives the upper part a new one, so a node's end never
moves and its start only moves up. Pure Python: `cache.py` calls it with what SGLang says about paths and locks.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .order import Usage

Scope = tuple[str | None, str | None, str | None]  # extra_key, cache_salt, lora_id


@dataclass(slots=True)
class Node:
    """tokens: of the logical positions [end - len(tokens), end); after a split, more than the node still has.

    protected: a request has marked some of them, so a merged copy would be of no use to it.
    """

    tokens: array[int]
    end: int
    scope: Scope
    usage: Usage = field(default_factory=Usage)
    queued: bool = False
    protected: bool = False

    @property
    def first(self) -> int:
        """Logical position of the first of its tokens."""
        return self.end - len(self.tokens)

    def own(self, start: int) -> array[int]:
        """Its tokens, given where it begins now."""
        assert self.first <= start < self.end, (self.first, start, self.end)
        return self.tokens[start - self.first :]


class NodeBook:
    """Node ids -> tokens, use and locks; and the nodes by age, for merging the cold ones."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        self._locks: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []  # (last_access, id); a lower bound, as in order.py

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, node_id: int) -> Node | None:
        """The node, or None when it was never seen on a path or is gone."""
        return self._nodes.get(node_id)

    def ids(self) -> list[int]:
        """Nodes that were seen and live."""
        return list(self._nodes)

    def touch(self, path: Iterable[tuple[int, int, int]], tokens: array[int], scope: Scope, now: int) -> None:
        """A request over `tokens` uses the path [(id, start, end), ...]. Copies the tokens of nodes it has not seen."""
        for node_id, start, end in path:
            node = self._nodes.get(node_id)
            if node is None:
                node = self._nodes[node_id] = Node(tokens[start:end], end, scope, Usage(created=now))
            node.usage.last_access = now
            if not node.queued:
                node.queued = True
                heapq.heappush(self._heap, (now, node_id))

    def protect(self, ids: Iterable[int]) -> None:
        """Nodes on a path whose tokens a request marked. For as long as they live: it may come back."""
        for node_id in ids:
            if (node := self._nodes.get(node_id)) is not None:
                node.protected = True

    def complete(self, path: Sequence[tuple[int, int, int]]) -> bool:
        """Makes every node of a path from the root down known; False where that is impossible.

        SGLang splits nodes at places that no request of ours is seen at. The lower part keeps its id, and here its old
        tokens: the upper part's are among them. It is as old and as used as the lower part.
        """
        source: Node | None = None  # of the known nodes further down, the one whose tokens begin first
        for node_id, start, end in reversed(path):
            node = self._nodes.get(node_id)
            if node is not None:
                source = node if source is None or node.first < source.first else source
            elif source is None or source.first > start:
                return False
            else:
                tokens = source.tokens[start - source.first : end - source.first]
                usage = replace(source.usage)
                self._nodes[node_id] = Node(tokens, end, source.scope, usage, protected=source.protected)
                self.put_back(node_id)
        return True

    def hit(self, path: Iterable[int]) -> None:
        """A request was admitted over this path."""
        for node_id in path:
            if (node := self._nodes.get(node_id)) is not None:
                node.usage.hits += 1

    def forget(self, node_id: int) -> None:
        """The node was evicted."""
        self._nodes.pop(node_id, None)
        if len(self._heap) > 2 * len(self._nodes) + 64:  # mostly evicted nodes
            self._heap = [entry for entry in self._heap if entry[1] in self._nodes]
            heapq.heapify(self._heap)

    def split(self, node_id: int, start: int, cut: int, upper_id: int) -> None:
        """SGLang's tree cut a node that begins at `start`: [start, cut) is now a node of its own, as old, as used."""
        node = self._nodes[node_id]
        tokens, usage = node.own(start)[: cut - start], replace(node.usage)
        self._nodes[upper_id] = Node(tokens, cut, node.scope, usage, protected=node.protected)
        self.put_back(upper_id)

    # -- locks --------------------------------------------------------------------------------------------------------

    def lock(self, node_id: int) -> None:
        """SGLang locked this node, and with it its path."""
        self._locks[node_id] = self._locks.get(node_id, 0) + 1

    def unlock(self, node_id: int) -> None:
        """Undoes one lock()."""
        count = self._locks.get(node_id, 0) - 1
        assert count >= 0, f"unlock of node {node_id} without lock"
        if count:
            self._locks[node_id] = count
        else:
            del self._locks[node_id]
            self.put_back(node_id)

    def locked(self, node_id: int) -> bool:
        """Whether this very node is locked: for a leaf, whether it may not be evicted."""
        return node_id in self._locks

    def any_locked(self) -> bool:
        """Whether a request runs over any node."""
        return bool(self._locks)

    # -- age ----------------------------------------------------------------------------------------------------------

    def coldest(self) -> tuple[int, Node] | None:
        """Takes the least recently used node out of the queue, or None.

        Its next use, the end of its last lock or put_back() queues it again.
        """
        while self._heap:
            time, node_id = heapq.heappop(self._heap)
            node = self._nodes.get(node_id)
            if node is None:
                continue
            if time != node.usage.last_access:
                heapq.heappush(self._heap, (node.usage.last_access, node_id))
                continue
            node.queued = False
            return node_id, node
        return None

    def put_back(self, node_id: int) -> None:
        """Queues a node that coldest() gave out."""
        node = self._nodes.get(node_id)
        if node is not None and not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (node.usage.last_access, node_id))


def tenant_of(namespace: Any) -> tuple[str | None, str | None]:
    """extra_key and cache_salt: what of a namespace a waiting request's key tells."""
    return namespace[:2]


def scope_of(req: Any, key: Any) -> Scope:
    """What must agree besides tokens; key: whatever carries extra_key and cache_salt."""
    return key.extra_key, key.cache_salt, getattr(req, "lora_id", None)
