"""Cold prefixes under the knife of pressure.py: nodes of SGLang's tree and raw spans are cut, or become spans."""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import torch

from keepkv_sglang.radix.adapter.book import SpanBook
from keepkv_sglang.radix.adapter.publish import insert_span
from keepkv_sglang.radix.nodes import NodeBook, Scope
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree


class Cache(Protocol):
    """What of KeepKVRadixCache (cache.py) is used here."""

    spans: SpanTree
    nodes: NodeBook
    book: SpanBook
    token_to_kv_pool_allocator: Any

    def path_of(self, node_id: int) -> tuple[Any, ...]: ...

    def match_core(self, tokens: array[int], scope: Scope) -> Any: ...

    def drop_spans(self, dead: list[Span]) -> None: ...

    def evict_node(self, node_id: int) -> Any: ...


class ColdPrefixes:
    """The half of the cache that merging under pressure works on."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def known_path(self, node_id: int) -> bool:
        """Whether all tokens up to the end of this node are known; learns what SGLang split by itself."""
        path = self._cache.path_of(node_id)
        return self._cache.nodes.complete([(n.node_id, n.path_start, n.path_end) for n in path])

    def prompt_of(self, node_id: int) -> array[int]:
        """All tokens up to the end of a node whose path is known."""
        prompt = array("q")
        for info in self._cache.path_of(node_id):
            node = self._cache.nodes.get(info.node_id)
            assert node is not None, f"not a known path: {info}"
            prompt.extend(node.own(info.path_start))
        return prompt

    def split_node(self, node_id: int, cut: int) -> None:
        """Cuts an evictable leaf of SGLang's tree at logical position `cut`: afterwards node_id begins there."""
        cache = self._cache
        start, node = cache.path_of(node_id)[-1].path_start, cache.nodes.get(node_id)
        assert node is not None
        cache.match_core(self.prompt_of(node_id)[:cut], node.scope)
        upper = cache.path_of(node_id)[-2]
        assert upper.path_end == cut, (upper, cut)
        cache.nodes.split(node_id, start, cut, upper.node_id)

    def split_span(self, span: Span, at: int) -> bool:
        """Cuts an unlocked raw span after `at` tokens; False where the upper part is there already."""
        cache = self._cache
        parts = cache.spans.split(span, at, span.slots[:at], span.slots[at:])
        if parts is None:
            return False
        cache.book.raw[parts[0].serial] = parts[0]
        cache.book.cut(*parts)
        return True

    def replace_node(self, node_id: int, namespace: tuple[Any, ...], slots: torch.Tensor) -> None:
        """An evictable leaf of SGLang's tree becomes a span of these slots; what hung below it hangs below the span.

        Spans of other configurations below it are dropped with it: their key names the anchor's uncompressed tokens.
        """
        cache = self._cache
        path = cache.path_of(node_id)
        node, start = cache.nodes.get(node_id), path[-1].path_start
        assert node is not None
        anchor, prompt = path[-2].node_id if start else None, self.prompt_of(node_id)
        n = len(prompt) - start
        span, created = insert_span(cache, None, anchor, start, namespace, prompt, n, slots, raw=False)
        home: Span | None = span
        if created:
            cache.spans.inherit(span, node.usage)
        else:
            cache.token_to_kv_pool_allocator.free(slots)
            if span.n != n:  # these tokens and its recent ones, which may be a raw span below it, are the node's
                home = cache.spans.match([(anchor, start)], namespace, prompt, touch=False)
                home = home if home is not None and home.path_tokens == len(prompt) else None
        if home is not None and cache.spans.has_anchor(node_id):
            cache.drop_spans(cache.spans.adopt(node_id, namespace, home))
        cache.evict_node(node_id)
