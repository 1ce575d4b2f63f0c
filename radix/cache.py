"""SGLang's prefix cache with compressed spans beside it: a thin adapter between UnifiedRadixCache and SpanTree.

SGLang's core (Rust or Python) keeps the uncompressed prefixes, one slot per token. Compressed spans hang below an
anchor, a node of that core, and live in `spans` (tree.py). Who owns a slot when: README.md. Only this file,
its halves growth.py and eviction.py, and the hooks know both worlds.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey

from keepkv_sglang import runtime
from keepkv_sglang.guard import guarded
from keepkv_sglang.radix.events import SpanEvents
from keepkv_sglang.radix.growth import MOST_NAMESPACES, SpanGrowth
from keepkv_sglang.radix.invariants import check_slots, check_tree
from keepkv_sglang.radix.keyhash import as_tokens
from keepkv_sglang.radix.nodes import NodeBook, Scope
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree
from keepkv_sglang.request import RequestState, logical_tokens

logger = logging.getLogger("keepkv")


def create(ctx: Any) -> Any:
    """Factory for register_radix_cache_backend."""
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    return create_unified_radix_cache(ctx, cache_class=KeepKVRadixCache)


class KeepKVRadixCache(SpanGrowth):
    """UnifiedRadixCache whose handles may also be spans: last_node, lock and paths accept a NodeId or a Span."""

    is_keepkv = True

    def __init__(self, params: Any) -> None:
        self._params = params
        self.events: SpanEvents | None = None
        super().__init__(params)
        if params.enable_kv_cache_events and not params.disable:
            self.events = SpanEvents(
                self.tree_core,
                dynamo_format=params.dynamo_kv_event_format,
                lora_names=params.kv_event_lora_names,
            )

    def reset(self) -> None:
        # Called by the parent's __init__ too, so the fields are made here.
        self.spans = SpanTree(self._params.eviction_policy, group_of=tenant_of, on_split=self.was_cut)
        self.nodes = NodeBook()  # of SGLang's tree: ages for one eviction order over both trees, tokens, locks
        # Dictionaries, not sets: tensor-parallel ranks must walk them in the same order.
        self.namespaces: dict[Scope, dict[tuple[Any, ...], int]] = {}  # how many spans each has
        self.covered = {}
        self.raw_spans: dict[int, Span] = {}  # by serial: what pressure.py may still merge; forgotten lazily
        self.evict_goal = None
        super().reset()

    def take_events(self) -> list[Any]:
        return self.events.take() if self.events is not None else super().take_events()

    # -- matching -----------------------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The longer of SGLang's uncompressed match and the longest chain of compressed spans (in logical tokens)."""
        result = super().match_prefix(params)
        rt = runtime.active()
        if rt is None or self.disable or not isinstance(result.last_device_node, int):
            return result
        if envs.SGLANG_RADIX_FORCE_MISS.get():
            return result  # SGLang turns it into a miss afterwards and knows nothing of our slot count
        longer: MatchResult = self._match_spans(rt, params, result)
        return longer

    @guarded(lambda _error, _self, _rt, _params, result: result)
    def _match_spans(self, rt: runtime.Runtime, params: MatchPrefixParams, result: MatchResult) -> MatchResult:
        """SGLang's result, or a chain of spans that is longer."""
        key = params.key
        path = self.path_of(result.last_device_node) if result.device_prefix_len else ()
        state = rt.state_of(params.req) if params.req is not None else None
        entry = None
        if state is not None and len(self.spans):
            keyed = state.protection.keyed(as_tokens(key.token_ids))
            entry = self.spans.match(self.anchors_of(path), state.namespace, keyed, len(key), touch=False)
            if entry is not None and entry.path_tokens <= result.device_prefix_len:
                entry = None
            if entry is not None:
                self.spans.touch(entry)
        # After the spans: an anchor is never older than what hangs below it.
        self._touch(path, key.token_ids, _scope(params.req, key), state)
        if entry is None:
            return result
        return result._replace(
            device_prefix_len=entry.path_tokens,
            last_device_node=entry,
            host_hit_length=0,
            cache_protected_len=entry.path_slots,
        )

    def touch_prefix(self, key: RadixKey) -> None:
        """SGLang keeps what waiting requests will need from being evicted: the spans among it too."""
        if self.disable or runtime.active() is None:
            super().touch_prefix(key)
            return
        found = super().match_prefix(MatchPrefixParams(key=key))  # touches what touch_prefix does, and tells the path
        self._touch_spans(key, found)

    @guarded()
    def _touch_spans(self, key: RadixKey, found: MatchResult) -> None:
        path = self.path_of(found.last_device_node) if found.device_prefix_len else ()
        if len(self.spans):
            anchors, tokens, tenant = self.anchors_of(path), as_tokens(key.token_ids), (key.extra_key, key.cache_salt)
            for namespace in self.spans.namespaces(anchors, tenant, tokens, MOST_NAMESPACES):
                entry = self.spans.match(anchors, namespace, tokens, len(key) - 1, touch=False)
                if entry is not None:
                    self.spans.touch(entry)  # no hit: it comes by every round
        self._touch(path, key.token_ids, (key.extra_key, key.cache_salt, None))

    def _touch(self, path: tuple[Any, ...], tokens: Any, scope: Scope, state: RequestState | None = None) -> None:
        if path:
            steps = [(info.node_id, info.path_start, info.path_end) for info in path]
            self.nodes.touch(steps, as_tokens(tokens), scope, self.spans.tick())
            if state is not None:
                self.nodes.protect(step[0] for step in steps if state.protection.touches(*step[1:]))

    def _touch_of(self, req: Any) -> None:
        """Stamps the path that the request holds in SGLang's tree."""
        node: Any = req.last_node.anchor if isinstance(req.last_node, Span) else req.last_node
        if node is not None and not self.is_root(node):
            state = getattr(req, runtime.STATE, None)
            self._touch(self.path_of(node), req.full_untruncated_fill_ids, _scope(req, req), state)

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
        self._touch_of(req)

    def publish_span(
        self,
        req: Any,
        namespace: tuple[Any, ...],
        tokens: array,
        first: int,
        start: int,
        m: int,
        *,
        raw: bool,
        lookahead: int = 0,
    ) -> bool:
        """Hands row slots [start, start + m) to the cache as one span below the request's present lock.

        tokens: what the slots stand for, beginning at logical position `first`; the `lookahead` tokens of the request
        behind them had a say in what was kept. An identical span that is already there is adopted: the row is pointed
        at its slots and ours are freed. Returns False when the slots stay private: the request is barred from the
        cache, or a different twin is in the way.
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
        state = getattr(req, runtime.STATE)
        end = first + len(tokens)
        keyed = state.protection.keyed(logical_tokens(req)[: end + lookahead])
        prompt, behind = keyed[:end], keyed[end:]
        assert len(behind) == lookahead, (len(keyed), end, lookahead)
        if raw and parent is not None and self.join_span(parent, prompt, len(tokens), slots):
            kv.cache_protected_len = start + m  # under the lock that the request has
            self._touch_of(req)
            self._count_published()
            return True
        span, created = self.insert_span(parent, anchor, anchor_len, namespace, prompt, len(tokens), slots, raw, behind)
        if not created:
            if (span.n, span.m) != (len(tokens), m):
                return False
            self.req_to_token_pool.write((kv.req_pool_idx, slice(start, start + m)), span.slots.to(torch.int32))
            self.token_to_kv_pool_allocator.free(slots)
        self._move_lock(req, span, start + m)
        self._touch_of(req)
        if created:
            self._count_published()
        return True

    def _count_published(self) -> None:
        rt = runtime.active()
        if rt is not None:
            rt.counters["published"] += 1

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Stock for requests that are never compressed; of the others only the anchor is published uncompressed.

        Their spans are published by schedule.py: a prompt when it is compressed, the reply before release.
        """
        rt = runtime.active()
        state = rt.state_of(req) if rt is not None else None
        if state is None:
            super().checkpoint(req, up_to=up_to, **kwargs)
            self._note_checkpoint(req)
        elif state.admitted:
            self.publish_anchor(req, min(state.anchor_len, up_to))

    @guarded()
    def _note_checkpoint(self, req: Any) -> None:
        """What SGLang has published is in use, and may be a copy of what spans hold."""
        if not self.disable and not self.is_root(req.last_node):
            self._touch_of(req)
            self._find_covered(self.path_of(req.last_node), req.full_untruncated_fill_ids, _scope(req, req))

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

    def check(self, running: Iterable[int] | None = None) -> None:
        """Every invariant of radix/README.md over both trees; AssertionError names the one that fails.

        running: slots that running requests own; None: nothing runs, so nothing may be locked either. Walks everything:
        for tests (KEEPKV_CHECK=1 does it whenever the server is idle), not for serving.
        """
        if self.disable:
            return
        check_tree(self.spans, lambda slots: slots.tolist())
        for span in self.spans.spans():
            if span.anchor is not None:
                anchor: Any = span.anchor
                info = self.path_of(anchor)[-1]  # KeyError: the anchor is gone
                assert info.path_end == span.anchor_len, f"I8: anchor {info} of {span!r} ends elsewhere"
        allocator = self.token_to_kv_pool_allocator
        owners = {
            "the free list": allocator.get_all_free_pages().tolist(),
            "SGLang's tree": self.tree_core.all_values_flatten().tolist(),
            "spans": [slot for span in self.spans.spans() for slot in span.slots.tolist()],
        }
        check_slots(int(allocator.size), {**owners, "running requests": running or ()})
        assert running is not None or not (self.nodes.any_locked() or self.spans.protected_slots), "I2: locked at idle"


def tenant_of(namespace: Any) -> tuple[str | None, str | None]:
    """extra_key and cache_salt: what of a namespace a waiting request's key tells."""
    return namespace[:2]


def _scope(req: Any, key: Any) -> Scope:
    """What must agree besides tokens; key: whatever carries extra_key and cache_salt."""
    return key.extra_key, key.cache_salt, getattr(req, "lora_id", None)
