"""Uncompressed copies of what compressed spans hold: young, but the first to be given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keepkv_sglang.radix.keyhash import as_tokens
from keepkv_sglang.radix.nodes import NodeBook, Scope
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

MOST_NAMESPACES = 4
"""Configurations that are looked at for one text: those that cached it last."""
MOST_IN_USE = 32
"""Copies looked at per eviction that turn out to be in use."""


class CoveredCopies:
    """Nodes of SGLang's tree, by id, each with a span that holds its tokens too."""

    def __init__(self, spans: SpanTree, nodes: NodeBook) -> None:
        self._spans, self._nodes = spans, nodes
        self._span_of: dict[int, Span] = {}

    def __len__(self) -> int:
        return len(self._span_of)

    def find(self, path: tuple[Any, ...], tokens: Any, scope: Scope) -> None:
        """Looks along a path of SGLang's tree, over the whole of `tokens`."""
        wanted = [info for info in path if not self._known(info.node_id)]
        if not wanted or not len(self._spans):
            return
        anchors, tokens = self.anchors_of(path), as_tokens(tokens)
        for namespace in self._spans.namespaces(anchors, scope[:2], tokens, MOST_NAMESPACES):
            if namespace[:3] != scope:  # type: ignore[index]
                continue
            entry = self._spans.match(anchors, namespace, tokens, touch=False)
            for info in wanted:  # from the top down: popitem() then gives the lowest first
                covers = (
                    entry is not None and entry.anchor_len <= info.path_start and info.path_end <= entry.path_tokens
                )
                if covers and entry is not None and not self._known(info.node_id):
                    self._span_of[info.node_id] = entry

    def _known(self, node_id: int) -> bool:
        span = self._span_of.get(node_id)
        return span is not None and not span.dead

    def anchors_of(self, path: tuple[Any, ...]) -> list[tuple[int | None, int]]:
        """(anchor, its length) of everything on a path of SGLang's tree that spans may hang below."""
        return [(None, 0)] + [(n.node_id, n.path_end) for n in path if self._spans.has_anchor(n.node_id)]

    def forget(self, node_id: int) -> None:
        """The node was evicted."""
        self._span_of.pop(node_id, None)

    def evict(
        self, missing: Callable[[], int], evictable: Callable[[int], bool], evict: Callable[[int], object]
    ) -> None:
        """Gives copies up, the newest first, while slots are missing; those in use stay."""
        in_use: dict[int, Span] = {}
        while self._span_of and len(in_use) < MOST_IN_USE and missing():
            node_id, entry = self._span_of.popitem()
            if entry.dead or self._nodes.get(node_id) is None or self._spans.has_anchor(node_id):
                continue  # no longer true, or needed as an anchor
            if evictable(node_id):
                evict(node_id)
            else:
                in_use[node_id] = entry
        self._span_of.update(reversed(in_use.items()))
