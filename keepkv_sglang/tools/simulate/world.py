"""One server's memory without a model: SGLang's pools and tree, and for KeepKV the real runtime, schedule and hooks.

Two things stand in for the server: the pool holds no layers, so merging a span's contents does nothing, and requests
are driven by replay.py instead of SGLang's scheduler. Span borders, anchors, publishing, locks, eviction, query
windows and slots are the server's own code on SGLang's own Req, allocator and radix cache.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.mem_cache import allocation, common
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams

from keepkv_sglang.hooks import extend as extend_hooks
from keepkv_sglang.hooks import scheduler as scheduler_hooks
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.radix.adapter.cache import KeepKVRadixCache
from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.runtime import attach, due, pressure, process, stream, unpack
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.turn.anchor import MessageBorder
from keepkv_sglang.turn.capacity import peak_slots
from keepkv_sglang.turn.queries import capture

from .scale import scaled
from .sglang_parts import HugeAllocator, empty_originals, sglang_context
from .stopwatch import Stopwatch
from .traces import BORDER

CHUNK_TOKENS = 8192  # SGLang's --chunked-prefill-size on most GPUs
MERGE_FLOPS, PREFILL_FLOPS = 2.0 * 32 * 8 * 128, 2.0 * 8e9  # pressure.worth_merging for an 8B Llama
_CHECK_SPANS = 20_000  # above this the walk over every span's whole path takes minutes


class World:
    """Pools and prefix cache of one server. All counts are in simulated tokens and slots.

    config: None for stock SGLang, else a KeepKV configuration in real tokens; it is scaled here. rows: most requests
    that run at once. Use it inside `with world.running():`, which makes it the process's runtime.
    """

    def __init__(
        self,
        config: KeepKVConfig | None,
        slots: int,
        scale: int,
        longest: int,
        rows: int,
        chunk_tokens: int = CHUNK_TOKENS,
        huge: bool = False,
        arena_rows: int = 0,
    ) -> None:
        self.slots, self.scale = slots, scale
        self.chunk = max(1, chunk_tokens // scale)
        self.arena_rows = -(-arena_rows // scale)  # 0: as many as the server wants without a limit in bytes
        self.config = scaled(config, scale) if config is not None else None
        allocator_class = HugeAllocator if huge else TokenToKVPoolAllocator
        self.allocator = allocator_class(slots, torch.int64, "cpu", None, False)
        self.rows = ReqToTokenPool(rows, longest + 1, "cpu", False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
            tree_components=(ComponentType.FULL,),
        )
        self.rt: process.Runtime | None = None
        self.tree: Any
        with sglang_context():
            self.tree = (KeepKVRadixCache if config is not None else UnifiedRadixCache)(params)
        self.stopwatch = Stopwatch()
        self.evicted = 0
        self.peak = 0
        self.promised: dict[Any, int] = {}  # running request -> slots that its reply may still take
        self.reserved = 0  # their sum
        self.cut = 0  # replies that ended early because a compression that admission counted on did not happen
        self._alloc_for_extend = inspect.unwrap(allocation.alloc_for_extend)
        self._release = inspect.unwrap(common.release_kv_cache)
        self._watch()

    def _watch(self) -> None:
        """Times the tree's operations from outside, and counts what was evicted."""
        tree, watch = self.tree, self.stopwatch
        evict = tree._evict

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = evict(*args, **kwargs)
            self.evicted += result.num_tokens_evicted
            return result

        tree._evict = watch.wrap("evict", counted)
        tree.match_prefix = watch.wrap("match", tree.match_prefix)
        tree.checkpoint_into_tree = watch.wrap("insert", tree.checkpoint_into_tree)
        if self.config is not None:
            tree.publish_span = watch.wrap("insert", tree.publish_span)

    @contextmanager
    def running(self) -> Iterator[World]:
        """SGLang's context and KeepKV's runtime are this world's; both as before afterwards."""
        before = process._runtime, allocation._prefix_kv_indices
        threads = torch.get_num_threads()
        with sglang_context():
            try:
                torch.set_num_threads(1)  # slot lists are short: threads only wait for each other
                process._runtime = None
                if self.config is not None:
                    self._start(self.config)
                    original = inspect.unwrap(allocation._prefix_kv_indices)
                    allocation._prefix_kv_indices = lambda batch, req: extend_hooks.around_prefix_kv_indices(
                        original, batch, req
                    )
                yield self
            finally:
                process._runtime, allocation._prefix_kv_indices = before
                torch.set_num_threads(threads)

    def _start(self, config: KeepKVConfig) -> None:
        """What runtime/attach.py does, with no layers and no tokenizer."""
        if self.rt is not None:
            process._runtime = self.rt
            return
        rt = self.rt = process.start(config)
        rt.scheduler = SimpleNamespace(
            enable_overlap=False,
            _engine_paused=False,
            waiting_queue=[],
            chunked_req=None,
            max_prefill_tokens=self.chunk,
        )
        # Per pair of tokens and per token: a simulated pair stands for scale^2 real ones, a token for scale.
        rt.merge_flops, rt.prefill_flops = MERGE_FLOPS * self.scale, PREFILL_FLOPS
        rt.kv_pool = SimpleNamespace(layer_num=0, start_layer=0)
        rt.votes = VoteStore(0, self.slots, 1, "cpu")
        # context_len is the longest request's here
        self.arena_rows = attach.arena_rows(config, True, self.rows.max_context_len, self.arena_rows or 1 << 60)
        attach.share_arena(rt, QueryArena(0, self.arena_rows, 1, 1, torch.float32, "cpu"), references=True)
        if config.keeps_originals:
            rt.originals = empty_originals(config, self.slots, self.rows.max_context_len, self.scale, rt.counters)
        limits = rt.limits
        limits.border, limits.chunk_tokens = MessageBorder(BORDER, 0), self.chunk
        limits.capacity, limits.pool_limit = self.slots, self.slots - 1
        attach.pools(rt, self.tree, self.allocator, self.rows)

    def relieve(self, waiting: list[Any], steps: int) -> None:
        """Merges cold prefixes under pressure, as the server does in each of the scheduler steps that went by."""
        if self.rt is None:
            return
        self.rt.scheduler.waiting_queue = waiting
        for _ in range(steps):
            before = self.rt.counters.pressure_merges
            pressure.relieve(self.rt)
            if self.rt.counters.pressure_merges == before:
                break

    # -- one request --------------------------------------------------------------------------------------------------

    def new_request(self, rid: str, prompt: array[int], reply: int, group: str = "") -> Any:
        """SGLang's Req. Sets finished_reason when the server would refuse it: its prompt cannot fit the pool.

        A reply that does not fit beside its prompt is cut, as by Scheduler.init_req_max_new_tokens.
        """
        req = Req(rid, "", prompt, SamplingParams(max_new_tokens=reply))
        room = self.slots - len(prompt) - 2
        state = self.rt.requests.state_of(req) if self.rt is not None else None
        if self.rt is not None and state is not None and self.rt.requests.too_long(req):
            room = self.slots - peak_slots(self.rt.limits, state, prompt, len(prompt)) - 2
        if room < 1:
            req.finished_reason = FINISH_ABORT("longer than the pool")
        req.sampling_params.max_new_tokens = max(0, min(reply, room))
        return req

    def admit(self, req: Any) -> bool:
        """Matches the prompt and locks the match when the prompt, its reply and the replies of others have room.

        The rule of SGLang's PrefillAdder and KeepKV's part in it (hooks/admission.py), except that all of the running
        requests' remaining reply tokens count (SGLang begins with 70 %), so nothing is ever retracted.
        """
        if not self.rows.available_size():
            return False
        req.init_next_round_input(self.tree)
        rt, state = self.rt, self._state(req)
        if rt is not None and state is not None and unpack.propose(rt, req, state):
            if self._takes(req, state):
                return True
            unpack.withdraw(rt, req, state)
        taken = self._takes(req, state)
        if not taken and rt is not None and state is not None:
            stream.give_up(rt, req, state)
        return taken

    def _takes(self, req: Any, state: Any) -> bool:
        """Admits the request as it is matched: over its originals where it asks for them."""
        req.lock = self.tree.lock(req.last_node)
        brought = req.host_hit_length
        extend = len(req.full_untruncated_fill_ids) - req.prefix_len - brought
        reply = req.sampling_params.max_new_tokens
        later, wanted = reply, extend + reply + 1
        if self.rt is not None and state is not None:
            if self.rt.requests.too_long(req):
                peak = peak_slots(self.rt.limits, state, req.origin_input_ids, extend)
                later = state.reply_growth(reply)
                wanted = min(wanted, reply + 1 + peak) if self.promised else peak + 1
            else:
                # Here replies end while a prompt is computed, so its slots are not theirs before it is compressed.
                later = max(0, unpack.later(self.rt, req, state, extend, reply))
                wanted = extend + later + 1
        full = brought + wanted >= self.free_or_evictable() - self.reserved
        loaded = self.tree.init_load_back(SimpleNamespace(req=req)) if brought and not full else (0, None)
        req.prefix_len += loaded[0] if loaded is not None else 0
        if full or loaded is None:
            self.tree.unlock(req.lock)
            req.lock = None
            return False
        self._promise(req, later)
        return True

    def _promise(self, req: Any, slots: int) -> None:
        self.reserved += slots - self.promised.get(req, 0)
        self.promised[req] = slots

    def prefill(self, req: Any) -> bool:
        """Allocates the prompt's slots; a prompt that cannot be in the pool whole is compressed after each chunk.

        Returns False when a chunk found no room: the request must be released.
        """
        end = len(req.full_untruncated_fill_ids)
        state = self._state(req)
        too_long = state is not None and self.rt is not None and self.rt.requests.too_long(req)
        step = self.chunk if too_long else end
        while True:
            stop = min(end, req.prefix_len + step)
            if self.free_or_evictable() - self.reserved < stop - req.prefix_len:
                return False
            self._extend(req, stop)
            if stop == end:
                return True
            common.checkpoint_kv_cache(req, self.tree)  # Scheduler.stash_chunked_request, and our hook behind it
            self._compress(req, between_chunks=True)

    def _extend(self, req: Any, stop: int) -> None:
        first = req.prefix_len
        req.extend_end = stop
        batch = SimpleNamespace(
            reqs=[req],
            prefix_lens=[first],
            extend_lens=[stop - first],
            extend_num_tokens=stop - first,
            seq_lens_cpu=torch.tensor([stop]),
            seq_lens=torch.tensor([stop]),
            device="cpu",
            req_to_token_pool=self.rows,
            tree_cache=self.tree,
            hisparse_coordinator=None,
            maybe_evict_swa=lambda: None,
            is_dllm=lambda: False,
        )
        if self.rt is not None:
            extend_hooks.around_alloc_for_extend(self._alloc_for_extend, batch)
        else:
            self._alloc_for_extend(batch)
        self._capture(req, first, stop)
        self._note_peak()

    def prefilled(self, req: Any) -> None:
        """The prompt is computed: publish it, and compress what is due."""
        common.checkpoint_kv_cache(req, self.tree)
        self._compress(req)
        state = self._state(req)
        if state is not None:
            self._promise(req, state.reply_growth(req.sampling_params.max_new_tokens))

    def finish(self, req: Any, reply: array[int]) -> None:
        """Decodes the whole reply, compressing at every interval, and releases the row into the cache.

        The last token of a reply is never run through the model, so it has no slot.
        """
        count = req.sampling_params.max_new_tokens
        self._promise(req, 0)  # it is taken now
        left = max(0, count - 1)
        while left:
            step = min(left, self._until_due(req))
            if self.free_or_evictable() < step:
                self.cut += 1
                count -= left
                break
            self._decode(req, step)
            left -= step
            req.output_ids.extend(reply[len(req.output_ids) : count - left])  # the last one is only sampled
            if left:
                self._compress(req)
        req.output_ids.extend(reply[len(req.output_ids) : count])
        self._end(req, FINISH_LENGTH(count))

    def abort(self, req: Any) -> None:
        """Releases a request in the middle of its prompt."""
        self._end(req, FINISH_ABORT("the pool is full in the middle of this prompt"), checkpoint=False)

    def retract(self, req: Any) -> None:
        """Takes a running request's row away; what the cache can keep of it is published."""
        self._end(req, None, checkpoint=False)

    def _end(self, req: Any, reason: Any, checkpoint: bool = True) -> None:
        req.finished_reason = reason
        self.reserved -= self.promised.pop(req)
        if not req.kv.holds_kv:  # nothing was allocated yet
            self.tree.unlock(req.lock)
            req.lock = None
        elif self.rt is not None:
            scheduler_hooks.around_release(self._release, req, self.tree, checkpoint=checkpoint)
        else:
            self._release(req, self.tree, checkpoint=checkpoint)

    def _decode(self, req: Any, count: int) -> None:
        kv = req.kv
        slots = allocation.alloc_token_slots(self.tree, count)
        length = kv.kv_committed_len
        self.rows.write((kv.req_pool_idx, slice(length, length + count)), slots.to(torch.int32))
        kv.kv_allocated_len = kv.kv_committed_len = length + count
        state = self._state(req)
        if state is not None:
            self._capture(req, length + state.offset, length + state.offset + count)
        self._note_peak()

    def _until_due(self, req: Any) -> int:
        """Tokens until the next compression of the reply; a failed one is tried again after one window."""
        state = self._state(req)
        if state is None:
            return 1 << 60
        config = state.config
        due = (state.plan[-1].end if state.plan else state.interval_start) + config.interval
        missing = due - (req.kv.kv_committed_len + state.offset)
        return missing if missing > 0 else min(config.window, config.interval)

    def _state(self, req: Any) -> Any:
        return self.rt.requests.state_of(req) if self.rt is not None else None

    def _capture(self, req: Any, start: int, end: int) -> None:
        """The attention backend's part: which query windows these tokens fill. No queries are stored."""
        state = self._state(req)
        if state is not None and self.rt is not None:
            capture(self.rt.limits, state, start, end, ([], []), 0)

    def _compress(self, req: Any, between_chunks: bool = False) -> None:
        state = self._state(req)
        if state is not None and self.rt is not None and (state.plan or state.reply_queries is not None):
            self.rt.step_reserve = self.reserved
            due.compress_due(self.rt, req, state, between_chunks=between_chunks)
            self.rt.step_reserve = 0

    # -- counts -------------------------------------------------------------------------------------------------------

    def free_or_evictable(self) -> int:
        return self.allocator.available_size() + self.tree.evictable_size()

    def held(self) -> int:
        """Slots that running requests own themselves."""
        return sum(r.kv.kv_allocated_len - r.kv.cache_protected_len for r in self.promised if r.kv.holds_kv)

    def _note_peak(self) -> None:
        self.peak = max(self.peak, self.slots - self.free_or_evictable())

    def check(self) -> None:
        """AssertionError unless every slot is free, cached or held by a running request, exactly once."""
        parts = (
            self.allocator.available_size(),
            self.tree.evictable_size(),
            self.tree.protected_size(),
            self.held(),
        )
        assert sum(parts) == self.slots, f"free, evictable, protected, held {parts} are not {self.slots} slots"
        if self.rt is not None and len(self.tree.spans) <= _CHECK_SPANS:
            check_tree(self.tree.spans, slots_of=lambda slots: slots.tolist())
        if self.rt is not None:
            assert not self.rt.counters.mispublished, "a span did not follow its prefix"
            if self.rt.originals is not None:
                self.rt.originals.check()

    def flush(self) -> None:
        """Evicts everything; AssertionError unless every slot comes back, each once. Only when nothing runs."""
        assert not self.promised and not self.reserved and not self.tree.protected_size(), self.reserved
        self.tree._evict(EvictParams(num_tokens=self.slots))
        free = self.allocator.alloc(self.slots)
        assert free is not None and len(torch.unique(free)) == self.slots, "slots were lost or freed twice"
        if self.rt is not None and self.rt.arena is not None:
            assert self.rt.arena.free_rows == self.rt.arena.rows, "query windows were lost"
