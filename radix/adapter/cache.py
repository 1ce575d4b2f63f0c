"""SGLang's prefix cache with compressed spans beside it: a thin adapter between UnifiedRadixCache and SpanTree.

SGLang's core (Rust or Python) keeps the uncompressed prefixes, one slot per token. Compressed spans hang below an
anchor, a node of that core, and live in `spans` (tree.py). Who owns a slot when: ../README.md. Only this folder and the
hooks know both worlds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams, MatchResult, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from keepkv_sglang.faults.guard import guarded
from keepkv_sglang.radix.adapter import publish
from keepkv_sglang.radix.adapter.book import SpanBook
from keepkv_sglang.radix.adapter.check import check_cache
from keepkv_sglang.radix.adapter.cold import ColdPrefixes
from keepkv_sglang.radix.adapter.covered import MOST_NAMESPACES, CoveredCopies
from keepkv_sglang.radix.adapter.events import SpanEvents
from keepkv_sglang.radix.adapter.eviction import FULL, Goal, SpanEviction, Tracker
from keepkv_sglang.radix.adapter.requests import HostSide, Requests, State
from keepkv_sglang.radix.keyhash import as_tokens
from keepkv_sglang.radix.nodes import NodeBook, Scope, scope_of, tenant_of
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree


def create(ctx: Any) -> Any:
    """Factory for register_radix_cache_backend."""
    return create_unified_radix_cache(ctx, cache_class=KeepKVRadixCache)


class KeepKVRadixCache(UnifiedRadixCache):
    """UnifiedRadixCache whose handles may also be spans: last_node, lock and paths accept a NodeId or a Span.

    requests: set once the scheduler exists; until then, and where KeepKV is off, it is SGLang's cache. host: set where
    the server keeps originals.
    """

    is_keepkv = True
    requests: Requests | None = None
    host: HostSide | None = None
    book: SpanBook

    def __init__(self, params: Any) -> None:
        self._params = params
        super().__init__(params)
        if params.enable_kv_cache_events and not params.disable:
            self.book.events = SpanEvents(
                self.tree_core,
                dynamo_format=params.dynamo_kv_event_format,
                lora_names=params.kv_event_lora_names,
            )

    def reset(self) -> None:
        # Called by the parent's __init__ too, so the fields are made here.
        events = self.book.events if hasattr(self, "book") else None
        self.book = SpanBook(events, lambda: self.requests.pressure_key if self.requests is not None else None)
        self.spans = SpanTree(self._params.eviction_policy, group_of=tenant_of, on_split=self.book.cut)
        self.nodes = NodeBook()  # of SGLang's tree: ages for one eviction order over both trees, tokens, locks
        self.covered = CoveredCopies(self.spans, self.nodes)
        self.cold = ColdPrefixes(self)
        self.unfinished_slots = 0  # that a compression in mid-way writes: neither free nor in a row
        self._eviction = SpanEviction(self.spans, self.nodes, self.drop_spans)
        self._goal: Goal | None = None
        if self.host is not None:
            self.host.reset()
        super().reset()

    def take_events(self) -> list[Any]:
        return self.book.events.take() if self.book.events is not None else super().take_events()

    def configurations(self) -> set[str]:
        """Fingerprints of settings that cached spans have."""
        return self.book.configurations()

    # -- matching -----------------------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The longer of SGLang's uncompressed match and the longest chain of compressed spans (in logical tokens)."""
        result = super().match_prefix(params)
        if self.requests is None or self.disable or not isinstance(result.last_device_node, int):
            return result
        if envs.SGLANG_RADIX_FORCE_MISS.get():
            return result  # SGLang turns it into a miss afterwards and knows nothing of our slot count
        longer: MatchResult = self._match_spans(self.requests, params, result)
        return longer

    @guarded(lambda _error, _self, _requests, _params, result: result)
    def _match_spans(self, requests: Requests, params: MatchPrefixParams, result: MatchResult) -> MatchResult:
        """SGLang's result, or a chain of spans that is longer."""
        key = params.key
        path = self.path_of(result.last_device_node) if result.device_prefix_len else ()
        state = requests.state_of(params.req) if params.req is not None else None
        entry = None
        if state is not None and len(self.spans):
            keyed = state.protection.keyed(as_tokens(key.token_ids))
            entry = self.spans.match(self.covered.anchors_of(path), state.namespace, keyed, len(key), touch=False)
            if entry is not None and entry.path_tokens <= result.device_prefix_len:
                entry = None
            if entry is not None:
                self.spans.touch(entry)
        # After the spans: an anchor is never older than what hangs below it.
        self._touch(path, key.token_ids, scope_of(params.req, key), state)
        if entry is None:
            return result
        return result._replace(
            device_prefix_len=entry.path_tokens,
            last_device_node=entry,
            host_hit_length=0,
            cache_protected_len=entry.path_slots,
        )

    def match_core(self, tokens: array, scope: Scope) -> MatchResult:
        """SGLang's own match; it splits a node where the tokens end or part."""
        key = RadixKey(tokens, scope[0], cache_salt=scope[1])
        return super().match_prefix(MatchPrefixParams(key=key))

    def touch_prefix(self, key: RadixKey) -> None:
        """SGLang keeps what waiting requests will need from being evicted: the spans among it too."""
        if self.disable or self.requests is None:
            super().touch_prefix(key)
            return
        found = super().match_prefix(MatchPrefixParams(key=key))  # touches what touch_prefix does, and tells the path
        self._touch_spans(key, found)

    @guarded()
    def _touch_spans(self, key: RadixKey, found: MatchResult) -> None:
        path = self.path_of(found.last_device_node) if found.device_prefix_len else ()
        if len(self.spans):
            anchors, tokens, tenant = (
                self.covered.anchors_of(path),
                as_tokens(key.token_ids),
                (key.extra_key, key.cache_salt),
            )
            for namespace in self.spans.namespaces(anchors, tenant, tokens, MOST_NAMESPACES):
                entry = self.spans.match(anchors, namespace, tokens, len(key) - 1, touch=False)
                if entry is not None:
                    self.spans.touch(entry)  # no hit: it comes by every round
        self._touch(path, key.token_ids, (key.extra_key, key.cache_salt, None))

    def _touch(self, path: tuple[Any, ...], tokens: Any, scope: Scope, state: State | None = None) -> None:
        if path:
            steps = [(info.node_id, info.path_start, info.path_end) for info in path]
            self.nodes.touch(steps, as_tokens(tokens), scope, self.spans.tick())
            if state is not None:
                self.nodes.protect(step[0] for step in steps if state.protection.touches(*step[1:]))

    def touch_of(self, req: Any) -> None:
        """Stamps the path that the request holds in SGLang's tree."""
        node: Any = req.last_node.anchor if isinstance(req.last_node, Span) else req.last_node
        if node is not None and not self.is_root(node):
            state = self.requests.known_state(req) if self.requests is not None else None
            self._touch(self.path_of(node), req.full_untruncated_fill_ids, scope_of(req, req), state)

    def count_hit(self, node: Any) -> None:
        """A request was admitted on this match, for eviction orders that count hits."""
        if self.disable:
            return
        anchor: Any = node.anchor if isinstance(node, Span) else node
        if isinstance(node, Span):
            self.spans.touch(node, hit=True)
        if anchor is not None and not self.is_root(anchor):
            self.nodes.hit(info.node_id for info in self.path_of(anchor))

    def raw_tail_start(self, entry: Span) -> tuple[int, int, int]:
        """(slots, tokens) where the raw spans at the end of the chain begin, and how many of the tokens that follow the
        last compression left raw, inside its budget. The next turn compresses them."""
        node: Span | None = entry
        while node is not None and node.raw:
            node = node.parent
        if node is None:
            return entry.anchor_len, entry.anchor_len, 0
        return node.path_slots, node.path_tokens, node.lookahead

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

    def inc_lock_ref(self, node_id: Any, *args: Any, **kwargs: Any) -> Any:
        self.nodes.lock(node_id)
        return super().inc_lock_ref(node_id, *args, **kwargs)

    def dec_lock_ref(self, node_id: Any, *args: Any, **kwargs: Any) -> Any:
        self.nodes.unlock(node_id)
        return super().dec_lock_ref(node_id, *args, **kwargs)

    def move_lock(self, req: Any, node: Any, slots: int) -> None:
        """The cache's part of the request's row ends with `node`, after `slots` slots. The new lock first, so that the
        path never becomes evictable in between."""
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
        self.move_lock(req, target, slots)

    # -- originals in host memory: SGLang's names for what comes back from a host ------------------------------------

    def init_load_back(self, params: Any) -> tuple[int, Any] | None:
        """The request was admitted with its history's originals: they are loaded. None: there is no room after all."""
        return self.host.load(params.req) if self.host is not None else super().init_load_back(params)

    def load_back_is_cache_owned(self) -> bool:
        """What was loaded is the request's own, until its compression is published."""
        return self.host is None and super().load_back_is_cache_owned()

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish_anchor(self, req: Any, anchor_len: int) -> None:
        """Publishes the first anchor_len slots of the row uncompressed in SGLang's tree, once."""
        anchor_len = min(anchor_len, req.kv.kv_committed_len)  # an abort may come before all of it is computed
        if self.disable or req.skip_radix_cache_insert or anchor_len <= req.kv.cache_protected_len:
            return
        self.checkpoint_into_tree(req, up_to=anchor_len)
        self.touch_of(req)

    publish_span = publish.publish_span

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Stock for requests that are never compressed; of the others only the anchor is published uncompressed.

        Their spans are published by runtime/publish.py: a prompt when it is compressed, the reply before release.
        """
        state = self.requests.state_of(req) if self.requests is not None else None
        if state is None:
            super().checkpoint(req, up_to=up_to, **kwargs)
            self._note_checkpoint(req)
        elif state.admitted:
            self.publish_anchor(req, min(state.anchor_len, up_to))

    @guarded()
    def _note_checkpoint(self, req: Any) -> None:
        """What SGLang has published is in use, and may be a copy of what spans hold."""
        if not self.disable and not self.is_root(req.last_node):
            self.touch_of(req)
            self.covered.find(self.path_of(req.last_node), req.full_untruncated_fill_ids, scope_of(req, req))

    # -- paths --------------------------------------------------------------------------------------------------------

    def path_of(self, node_id: int) -> tuple[Any, ...]:
        """SGLang's TreePathNodeInfo of every node from the root's child down to node_id."""
        return self.tree_core.collect_path_info([node_id])[0]

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
        own = self.host.slots_of(req) if self.host is not None else None
        if own is None:
            return super().prefix_device_indices(req)
        return torch.cat([self.path_device_indices(req.last_node), own])

    def is_root(self, node: Any) -> bool:
        return not isinstance(node, Span) and super().is_root(node)

    def rotation_base_of(self, node: Any) -> int | None:
        return super().rotation_base_of(node.anchor if isinstance(node, Span) else node)

    def dfs_weight_order(self, node_handles: Any) -> list[int]:
        root = self.root_node_handle()
        handles = [
            (node.anchor if node.anchor is not None else root) if isinstance(node, Span) else node
            for node in node_handles
        ]
        return super().dfs_weight_order(handles)

    # -- sizes and eviction (eviction.py) -----------------------------------------------------------------------------

    def evictable_size(self) -> int:
        return super().evictable_size() + self.spans.evictable_slots

    def full_evictable_size(self) -> int:
        return super().full_evictable_size() + self.spans.evictable_slots

    def protected_size(self) -> int:
        return super().protected_size() + self.spans.protected_slots + self.unfinished_slots

    def full_protected_size(self) -> int:
        return super().full_protected_size() + self.spans.protected_slots + self.unfinished_slots

    def evictable_leaf(self, node_id: int) -> bool:
        """Whether this node of SGLang's tree may be evicted now. SGLang's core panics when asked for another."""
        if self.nodes.get(node_id) is None or self.nodes.locked(node_id):
            return False
        return not self.path_of(node_id)[-1].num_children

    def evict_node(self, node_id: int, tracker: Tracker | None = None) -> Any:
        """Evicts a leaf of SGLang's tree with its spans, whatever its age. The node above may be a leaf then."""
        tracker = {FULL: 0} if tracker is None else tracker
        path = self.path_of(node_id)
        result = super()._evict_device_leaf(node_id, tracker)
        if self.spans.has_anchor(node_id):
            self.drop_spans(self.spans.drop_anchor(node_id), tracker)
        self.nodes.forget(node_id)
        self.covered.forget(node_id)
        if len(path) > 1:
            self.nodes.put_back(path[-2].node_id)
        return result

    def drop_spans(self, dead: list[Span], tracker: Tracker | None = None) -> None:
        """Frees the slots of spans that the tree gave back; one call, since the allocator copies its list each time."""
        if not dead:
            return
        self.token_to_kv_pool_allocator.free(torch.cat([span.slots for span in dead]))
        if tracker is not None:
            tracker[FULL] += sum(span.m for span in dead)
        for span in dead:
            self.book.removed(span)

    def evict_slots(self, count: int) -> None:
        """Makes room: drops the next in line of both trees until `count` slots came free, or nothing is left."""
        self.evict(EvictParams(num_tokens=count))

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
        goal = self._goal = Goal(
            count,
            target[1] if target else None,
            allocation_reclaim_satisfied,
            lambda: self._component_available_size(FULL),
        )
        try:
            if count > 0:
                self.covered.evict(
                    lambda: goal.missing(tracker), self.evictable_leaf, lambda node: self.evict_node(node, tracker)
                )
            super()._evict_components(
                request_by_type,
                tracker,
                available_size_targets,
                allocation_reclaim_satisfied=allocation_reclaim_satisfied,
            )
            if count > 0:  # SGLang's tree has no victim left, but spans may: below locked anchors, or without any
                self._eviction.run(goal, tracker)
        finally:
            self._goal = None

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        """SGLang's victim: spans due before it go first; if they suffice it is spared."""
        assert self._goal is not None
        self._eviction.before(node_id, self._goal, tracker)
        return self.evict_node(node_id, tracker) if self._goal.missing(tracker) else None

    def check(self, running: Iterable[int] | None = None) -> None:
        """Every invariant of radix/README.md over both trees; AssertionError names the one that fails.

        running: slots that running requests own; None: nothing runs, so nothing may be locked either. Walks everything:
        for tests (KEEPKV_CHECK=1 does it whenever the server is idle), not for serving.
        """
        if self.disable:
            return
        check_cache(self, running)
