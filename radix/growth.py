"""How spans come into the cache and change there: inserted, cut, or made of a node of SGLang's tree."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey

from keepkv_sglang import runtime
from keepkv_sglang.protect import marked, plain
from keepkv_sglang.radix.eviction import FULL, JointEviction
from keepkv_sglang.radix.keyhash import as_tokens
from keepkv_sglang.radix.nodes import Scope
from keepkv_sglang.radix.span import Span

MOST_NAMESPACES = 4
"""Configurations that are looked at for one text: those that cached it last."""


class SpanGrowth(JointEviction):
    """The half of KeepKVRadixCache that puts spans in; which request's, and when, is cache.py and pressure.py."""

    def insert_span(
        self,
        parent: Span | None,
        anchor: int | None,
        anchor_len: int,
        namespace: tuple[Any, ...],
        prompt: array,
        n: int,
        slots: torch.Tensor,
        raw: bool,
        lookahead: Sequence[int] = (),
    ) -> tuple[Span, bool]:
        """Adds the last n tokens of `prompt`, held in `slots`; (span, True) or (the twin that is there, False).

        prompt, and the lookahead behind it: with the marks of what is protected (protect.py).
        """
        span, created = self.spans.insert(
            parent=parent,
            anchor=anchor,
            anchor_len=anchor_len,
            namespace=namespace,
            tokens=prompt[len(prompt) - n :],
            slots=slots,
            m=len(slots),
            raw=raw,
            lookahead=lookahead,
        )
        if not created:
            return span, False
        self.count_span(namespace, 1)
        # What a compression left raw belongs to the next one, not to pressure.
        if raw and not (parent is not None and n <= parent.lookahead):
            self._note_raw(span)
        if self.events is not None:
            self.events.stored(span, plain(prompt), *namespace[:2])
        self._note_covered(span, prompt, lookahead)
        return span, True

    def join_span(self, span: Span, prompt: array, n: int, slots: torch.Tensor) -> bool:
        """Appends the last n tokens of `prompt`, raw in `slots`, to the span that ends where they begin and that only
        the caller may hold; False where they need a span of their own: see SpanTree.can_join and join."""
        own = prompt[len(prompt) - n :]
        if not self.spans.can_join(span, n) or marked(own) != marked(span.tokens):
            return False
        if not self.spans.join(span, own, torch.cat([span.slots, slots])):
            return False
        self._note_raw(span)
        if self.events is not None:
            self.events.joined(span, n)
        self._note_covered(span, prompt)
        return True

    def _note_raw(self, span: Span) -> None:
        """A raw span that pressure may merge."""
        rt = runtime.active()
        if rt is not None and span.namespace[-1] == rt.pressure_key and not marked(span.tokens):  # type: ignore[index]
            self.raw_spans[span.serial] = span

    def _note_covered(self, span: Span, prompt: array, lookahead: Sequence[int] = ()) -> None:
        """Looks for uncompressed copies of what a span that has grown or is new holds."""
        scope: Scope = span.namespace[:3]  # type: ignore[index]
        below = self._match_core(plain(prompt), scope)
        if below.device_prefix_len > span.anchor_len:
            tokens = prompt + array("q", lookahead) if lookahead else prompt
            self._find_covered(self.path_of(below.last_device_node), tokens, scope)

    def anchors_of(self, path: tuple[Any, ...]) -> list[tuple[int | None, int]]:
        """(anchor, its length) of everything on a path of SGLang's tree that spans may hang below."""
        return [(None, 0)] + [(n.node_id, n.path_end) for n in path if self.spans.has_anchor(n.node_id)]

    def _find_covered(self, path: tuple[Any, ...], tokens: Any, scope: Scope) -> None:
        """Notes nodes of the path whose tokens are also in spans: they are young, but the first to be given up."""
        wanted = [info for info in path if (known := self.covered.get(info.node_id)) is None or known.dead]
        if not wanted or not len(self.spans):
            return
        anchors, tokens = self.anchors_of(path), as_tokens(tokens)
        for namespace in self.spans.namespaces(anchors, scope[:2], tokens, MOST_NAMESPACES):
            if namespace[:3] != scope:  # type: ignore[index]
                continue
            entry = self.spans.match(anchors, namespace, tokens, touch=False)
            for info in wanted:  # from the top down: popitem() then gives the lowest first
                if entry is not None and entry.anchor_len <= info.path_start and info.path_end <= entry.path_tokens:
                    known = self.covered.get(info.node_id)
                    if known is None or known.dead:
                        self.covered[info.node_id] = entry

    # -- merging under pressure (pressure.py) -------------------------------------------------------------------------

    def split_node(self, node_id: int, cut: int) -> None:
        """Cuts an evictable leaf of SGLang's tree at logical position `cut`: afterwards node_id begins there."""
        path = self.path_of(node_id)
        node = self.nodes.get(node_id)
        assert node is not None
        self._match_core(self.prompt_of(path)[:cut], node.scope)
        upper = self.path_of(node_id)[-2]
        assert upper.path_end == cut, (upper, cut)
        self.nodes.split(node_id, path[-1].path_start, cut, upper.node_id)

    def split_span(self, span: Span, at: int) -> bool:
        """Cuts an unlocked raw span after `at` tokens; False where the upper part is there already."""
        parts = self.spans.split(span, at, span.slots[:at], span.slots[at:])
        if parts is None:
            return False
        self.raw_spans[parts[0].serial] = parts[0]
        self.was_cut(*parts)
        return True

    def was_cut(self, upper: Span, lower: Span) -> None:
        """A raw span is two now."""
        self.count_span(upper.namespace, 1)
        if lower.serial in self.raw_spans:
            self.raw_spans[upper.serial] = upper
        if self.events is not None:
            self.events.split(upper, lower)

    def known_path(self, node_id: int) -> bool:
        """Whether all tokens up to the end of this node are known; learns what SGLang split by itself."""
        return self.nodes.complete([(n.node_id, n.path_start, n.path_end) for n in self.path_of(node_id)])

    def prompt_of(self, path: tuple[Any, ...]) -> array:
        """All tokens of a known path of SGLang's tree."""
        prompt = array("q")
        for info in path:
            node = self.nodes.get(info.node_id)
            assert node is not None, f"not a known path: {info}"
            prompt.extend(node.own(info.path_start))
        return prompt

    def _match_core(self, tokens: array, scope: Scope) -> MatchResult:
        """SGLang's own match; it splits a node where the tokens end or part."""
        key = RadixKey(tokens, scope[0], cache_salt=scope[1])
        return super().match_prefix(MatchPrefixParams(key=key))

    def replace_node(self, node_id: int, namespace: tuple[Any, ...], slots: torch.Tensor) -> None:
        """An evictable leaf of SGLang's tree becomes a span of these slots; what hung below it hangs below the span.

        Spans of other configurations below it are dropped with it: their key names the anchor's uncompressed tokens.
        """
        path = self.path_of(node_id)
        node, start = self.nodes.get(node_id), path[-1].path_start
        assert node is not None
        anchor, prompt = path[-2].node_id if start else None, self.prompt_of(path)
        n = len(prompt) - start
        span, created = self.insert_span(None, anchor, start, namespace, prompt, n, slots, raw=False)
        home: Span | None = span
        if created:
            self.spans.inherit(span, node.usage)
        else:
            self.token_to_kv_pool_allocator.free(slots)
            if span.n != n:  # these tokens and its recent ones, which may be a raw span below it, are the node's
                home = self.spans.match([(anchor, start)], namespace, prompt, touch=False)
                home = home if home is not None and home.path_tokens == len(prompt) else None
        if home is not None and self.spans.has_anchor(node_id):
            self.drop_spans(self.spans.adopt(node_id, namespace, home), {FULL: 0})
        self.evict_node(node_id, {FULL: 0})
