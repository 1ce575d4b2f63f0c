"""SGLang's prefix cache with compressed spans beside it: a thin adapter between UnifiedRadixCache and SpanTree.

SGLang's core (Rust or Python) keeps the uncompressed prefixes, one slot per token. Compressed spans hang below an
anchor, a node of that core, and live in `spans` (tree.py). Who owns a slot when: README.md. Only this file and the
hooks know both worlds.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult, TreeLock
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from keepkv_sglang import runtime
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

logger = logging.getLogger("keepkv")
FULL = ComponentType.FULL


def create(ctx: Any) -> Any:
    """Factory for register_radix_cache_backend."""
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    return create_unified_radix_cache(ctx, cache_class=KeepKVRadixCache)


class KeepKVRadixCache(UnifiedRadixCache):
    """UnifiedRadixCache whose handles may also be spans: last_node, lock and paths accept a NodeId or a Span."""

    is_keepkv = True
    spans: SpanTree

    def reset(self) -> None:
        # Called by the parent's __init__ too, so the fields are made here.
        self.spans = SpanTree()
        self._node_times: dict[int, int] = {}  # NodeId -> SpanTree clock, for one eviction order over both trees
        self._evict_goal: tuple[int, int | None, Any] | None = None
        super().reset()

    # -- matching -----------------------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The longer of SGLang's uncompressed match and the longest chain of compressed spans (in logical tokens)."""
        result = super().match_prefix(params)
        rt = runtime.active()
        if rt is None or self.disable or not isinstance(result.last_device_node, int):
            return result
        if envs.SGLANG_RADIX_FORCE_MISS.get():
            return result  # SGLang turns it into a miss afterwards and knows nothing of our slot count
        path = self._touch_path(result.last_device_node) if result.device_prefix_len else []
        state = rt.state_of(params.req) if params.req is not None else None
        if state is None or not len(self.spans):
            return result
        anchors = [(None, 0)] + [(node_id, end) for node_id, end in path if self.spans.has_anchor(node_id)]
        entry = self.spans.match(anchors, state.namespace, params.key.token_ids, len(params.key))
        if entry is None or entry.path_tokens <= result.device_prefix_len:
            return result
        return result._replace(
            device_prefix_len=entry.path_tokens,
            last_device_node=entry,
            host_hit_length=0,
            cache_protected_len=entry.path_slots,
        )

    def _touch_path(self, node_id: int) -> list[tuple[int, int]]:
        """Stamps every node on the path as used now; returns (NodeId, logical end) from the top down."""
        now = self.spans.tick()
        infos = self.tree_core.collect_path_info([node_id])[0]
        for info in infos:
            self._node_times[info.node_id] = now
        return [(info.node_id, info.path_end) for info in infos]

    def raw_tail_start(self, entry: Span) -> tuple[int, int]:
        """(slots, tokens) where the raw spans at the end of the chain begin: the next turn compresses them."""
        node: Span | None = entry
        while node is not None and node.raw:
            node = node.parent
        if node is None:
            return entry.anchor_len, entry.anchor_len
        return node.path_slots, node.path_tokens

    # -- locks --------------------------------------------------------------------------------------------------------

    def lock(self, node: Any, *args: Any, **kwargs: Any) -> TreeLock | None:
        """Locking a span locks its chain and its anchor; the anchor's own lock is kept as the receipt."""
        if not isinstance(node, Span):
            return super().lock(node, *args, **kwargs)
        self.spans.lock(node)
        return TreeLock(node, super().lock(node.anchor, *args, **kwargs) if node.anchor is not None else None)

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is None or not isinstance(lock.node, Span):
            super().unlock(lock)
            return
        self.spans.unlock(lock.node)
        super().unlock(lock.receipt)

    def _move_lock(self, req: Any, node: Any, slots: int) -> None:
        """The new lock first, so that the path never becomes evictable in between."""
        old, req.lock = req.lock, self.lock(node)
        req.last_node = node
        req.kv.cache_protected_len = slots
        self.unlock(old)

    def move_lock_up(self, req: Any, slots: int) -> None:
        """The request gives up what its row took from the cache behind row position `slots` (a span border)."""
        entry = req.lock.node
        assert isinstance(entry, Span), "only compressed chains are shortened"
        node: Span | None = entry
        while node is not None and node.path_slots > slots:
            node = node.parent
        target: Any = node
        if target is None:
            target = entry.anchor if entry.anchor is not None else self.root_node_handle(req.extra_key)
        assert slots == (node.path_slots if node is not None else entry.anchor_len), (slots, entry)
        self._move_lock(req, target, slots)

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish_anchor(self, req: Any, anchor_len: int) -> None:
        """Publishes the first anchor_len slots of the row uncompressed in SGLang's tree, once."""
        anchor_len = min(anchor_len, req.kv.kv_committed_len)  # an abort may come before all of it is computed
        if self.disable or req.skip_radix_cache_insert or anchor_len <= req.kv.cache_protected_len:
            return
        self.checkpoint_into_tree(req, up_to=anchor_len)
        if isinstance(req.last_node, int) and not self.is_root(req.last_node):
            self._touch_path(req.last_node)

    def publish_span(
        self, req: Any, namespace: tuple[Any, ...], tokens: array, first: int, start: int, m: int, *, raw: bool
    ) -> bool:
        """Hands row slots [start, start + m) to the cache as one span below the request's present lock.

        tokens: what the slots stand for, beginning at logical position `first`. An identical span that is already there
        is adopted: the row is pointed at its slots and ours are freed. Returns False when the slots stay private: the
        request is barred from the cache, or a different twin is in the way.
        """
        kv = req.kv
        if self.disable or req.skip_radix_cache_insert or start != kv.cache_protected_len:
            return False
        parent = req.lock.node if req.lock is not None and isinstance(req.lock.node, Span) else None
        anchor: Any
        if parent is not None:
            anchor, anchor_len = parent.anchor, parent.anchor_len
        else:
            anchor, anchor_len = (req.last_node, start) if start else (None, 0)
        if first != (parent.path_tokens if parent is not None else start):
            # The last line of defence against showing a slot under tokens it does not stand for. Tests assert 0.
            logger.error(
                "a span of request %s does not follow its prefix: %d, %r; not published", req.rid, first, parent
            )
            runtime.current().counters["mispublished"] += 1
            return False
        slots = self.req_to_token_pool.req_to_token[kv.req_pool_idx, start : start + m].to(torch.int64)
        span, created = self.spans.insert(
            parent=parent,
            anchor=anchor,
            anchor_len=anchor_len,
            namespace=namespace,
            tokens=tokens,
            slots=slots,
            m=m,
            raw=raw,
        )
        if not created:
            if span.m != m:
                return False
            self.req_to_token_pool.write((kv.req_pool_idx, slice(start, start + m)), span.slots.to(torch.int32))
            self.token_to_kv_pool_allocator.free(slots)
        if anchor is not None:
            self._touch_path(anchor)
        self._move_lock(req, span, start + m)
        rt = runtime.active()
        if rt is not None:
            rt.counters["published"] += created
        return True

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Stock for requests that are never compressed; of the others only the anchor is published uncompressed.

        Their spans are published by schedule.py: a prompt when it is compressed, the reply before release.
        """
        rt = runtime.active()
        state = rt.state_of(req) if rt is not None else None
        if state is None:
            super().checkpoint(req, up_to=up_to, **kwargs)
            if not self.disable and isinstance(req.last_node, int) and not self.is_root(req.last_node):
                self._touch_path(req.last_node)
        elif state.admitted:
            self.publish_anchor(req, min(state.anchor_len, up_to))

    # -- paths --------------------------------------------------------------------------------------------------------

    def path_device_indices(self, node: Any) -> torch.Tensor:
        if not isinstance(node, Span):
            return super().path_device_indices(node)
        parts = [span.slots for span in node.path()]
        if node.anchor is not None:
            parts.insert(0, super().path_device_indices(node.anchor))
        return torch.cat(parts)

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        if isinstance(req.last_node, Span):
            return self.path_device_indices(req.last_node)
        return super().prefix_device_indices(req)

    def is_root(self, node: Any) -> bool:
        return not isinstance(node, Span) and super().is_root(node)

    def rotation_base_of(self, node: Any) -> int | None:
        return super().rotation_base_of(node.anchor if isinstance(node, Span) else node)

    def dfs_weight_order(self, node_handles: Any) -> list[int]:
        root = self.root_node_handle()
        plain = [
            (node.anchor if node.anchor is not None else root) if isinstance(node, Span) else node
            for node in node_handles
        ]
        return super().dfs_weight_order(plain)

    # -- sizes and eviction -------------------------------------------------------------------------------------------

    def evictable_size(self) -> int:
        return super().evictable_size() + self.spans.evictable_slots

    def full_evictable_size(self) -> int:
        return super().full_evictable_size() + self.spans.evictable_slots

    def protected_size(self) -> int:
        return super().protected_size() + self.spans.protected_slots

    def full_protected_size(self) -> int:
        return super().full_protected_size() + self.spans.protected_slots

    def evict_slots(self, count: int) -> None:
        """Makes room for a compression; drops the coldest entries, never merges here (decision 9)."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.evict(EvictParams(num_tokens=count))

    def _drop(self, dead: list[Span], tracker: dict[ComponentType, int]) -> None:
        for span in dead:
            self.token_to_kv_pool_allocator.free(span.slots)
            tracker[FULL] += span.m

    def _goal_reached(self, tracker: dict[ComponentType, int]) -> bool:
        assert self._evict_goal is not None
        count, available, satisfied = self._evict_goal
        if satisfied is not None:
            return satisfied()
        if available is not None:
            return self._component_available_size(FULL) >= available
        return tracker[FULL] >= count

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
        self._evict_goal = (count, target[1] if target else None, allocation_reclaim_satisfied)
        try:
            super()._evict_components(
                request_by_type,
                tracker,
                available_size_targets,
                allocation_reclaim_satisfied=allocation_reclaim_satisfied,
            )
            # SGLang's tree has no victim left, but spans may: below locked anchors, or without any.
            while count > 0 and not self._goal_reached(tracker) and (span := self.spans.oldest()) is not None:
                self.spans.remove(span)
                self._drop([span], tracker)
        finally:
            self._evict_goal = None

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        """One order over both trees: spans older than SGLang's victim go first; if they suffice it is spared."""
        age = self._node_times.get(node_id, 0)
        while (span := self.spans.oldest()) is not None and span.last_access <= age:
            self.spans.remove(span)
            self._drop([span], tracker)
            if self._goal_reached(tracker):
                return None
        result = super()._evict_device_leaf(node_id, tracker)
        if self.spans.has_anchor(node_id):
            self._drop(self.spans.drop_anchor(node_id), tracker)
        self._node_times.pop(node_id, None)
        return result
