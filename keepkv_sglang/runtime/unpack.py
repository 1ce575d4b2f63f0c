"""A request's history as originals: brought into slots of its own before its prompt is read, archived when compressed.

Rides on what SGLang has for a host cache: the request says at admission how many tokens lie on the host, SGLang's
adder counts them, and asks the prefix cache to load them (radix/adapter/cache.py, `init_load_back`).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Any

import torch

from keepkv_sglang.compress.transfer import on_device
from keepkv_sglang.faults import guard
from keepkv_sglang.radix.span import Span
from keepkv_sglang.runtime import stream
from keepkv_sglang.runtime.compressor import allocate
from keepkv_sglang.runtime.originals import Originals
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import known_state, logical_tokens, row_of
from keepkv_sglang.runtime.streams import on_forward_stream
from keepkv_sglang.turn.capacity import later_slots
from keepkv_sglang.turn.plan import anchor_of
from keepkv_sglang.turn.state import RequestState
from keepkv_sglang.turn.unpack import Incomplete, Matched, history


@dataclass
class Unpacking:
    """A request between admission and the row that takes its slots over.

    view: the match that it replaces (stream.view_of). start, end: tokens [start, end) get slots of their own. known:
    where the last compression ended. last: block of the index that ends the archived part. slots: int64, once they are
    filled. failed: the pool had no room after all. error: or something of ours went wrong.
    """

    view: stream.View
    start: int
    end: int
    known: int
    last: Span | None
    slots: torch.Tensor | None = None
    failed: bool = False
    error: bool = False


def propose(rt: Runtime, req: Any, state: RequestState, taken: int = 0) -> bool:
    """At admission: makes the request ask for its history's originals instead of the compressed match. False: the match
    stays. Decided by counts alone. taken: arena rows promised to others in the same round."""
    originals = rt.originals
    stream.give_up(rt, req, state)  # of a round in which withdrawing failed, as is this:
    if originals is not None:
        originals.unpacking.pop(state, None)
    if originals is None or state.config.unpack == 0 or state.broken:
        return False
    if rt.limits.arena.free_rows - taken < rt.limits.queries_of(state.config):
        return False  # without queries the history would stay as it comes, a slot for each token
    node, prompt = req.last_node, req.full_untruncated_fill_ids
    if len(prompt) > len(req.origin_input_ids):  # after a retraction: its reply's spans end where they did
        return False
    last = originals.covers(state.namespace, state.protection.keyed(prompt), most_cached(req))
    matched, archived = _matched(rt, node, req.prefix_len), last.path_tokens if last is not None else 0
    known = matched.whole_from if matched.compressed else archived
    try:
        end = history(matched, archived, len(prompt), rt.limits.queries_of(state.config))
    except Incomplete:
        originals.missed[state] = "unpack_incomplete"
        return False
    if end is None:
        return False
    start = matched.uncompressed
    originals.missed.pop(state, None)
    room = originals.unpacked_slots + end - start <= state.config.unpack * rt.limits.capacity
    if not room or rt.requests.too_long(req):
        if not stream.propose(rt, req, state, last, known):
            originals.missed[state] = "unpack_no_room"
        return False
    # The first message goes into SGLang's own tree, where others read it: it is brought back only as they compute it.
    anchor_len = anchor_of(rt.limits, state, row_of(req), start)
    if start < min(anchor_len, end) and not (last is not None and originals.pure(last, anchor_len)):
        originals.missed[state] = "unpack_incomplete"
        return False
    originals.unpacking[state] = Unpacking(stream.view_of(req), start, end, known, last)
    anchor = node.anchor if isinstance(node, Span) else node
    req.last_node = req.best_match_node = anchor if anchor is not None else rt.tree.root_node_handle(req.extra_key)
    req.prefix_len = req.kv.cache_protected_len = start
    req.host_hit_length = end - start
    return True


def withdraw(rt: Runtime, req: Any, state: RequestState) -> bool:
    """The request was not admitted with slots for its originals: its compressed match is its prefix again, over which
    they may be streamed. Returns whether the pool had no room when they were to be loaded."""
    assert rt.originals is not None
    unpacking: Unpacking = rt.originals.unpacking.pop(state)
    stream.give_view(req, unpacking.view)
    if unpacking.error or not stream.propose(rt, req, state, unpacking.last, unpacking.known):
        rt.originals.missed[state] = "unpack_no_room"
    return unpacking.failed


def pending(rt: Runtime, state: RequestState) -> Unpacking | None:
    """What the request asks for, or has got and its row has not taken over yet."""
    return rt.originals.unpacking.get(state) if rt.originals is not None else None


def later(rt: Runtime, req: Any, state: RequestState, extend: int, new_tokens: int, taken: int = 0) -> int:
    """capacity.later_slots, of a request that may be read over its originals: those that have slots give them back when
    they are compressed. Those that are streamed have none to give, and their compression takes fresh ones beside its
    match: only then may it be more than `new_tokens`."""
    row, missing, new = row_of(req), 0, 0
    if (unpacking := pending(rt, state)) is not None:
        row, extend = replace(row, prefix=unpacking.start), extend + unpacking.end - unpacking.start
        new = row.total - unpacking.known
    elif (streamed := stream.pending(rt, state)) is not None:
        missing = streamed.tokens - streamed.start
        row, extend = replace(row, prefix=streamed.start), extend + missing
        new = row.total - streamed.known
    if new <= state.config.min_tokens:
        missing += max(0, new)  # they stay whole (spans.fresh_tokens)
    slots = missing + later_slots(rt.limits, state, row, extend, new_tokens, taken)
    return slots if state.streamed else min(new_tokens, slots)


class HostSide:
    """What the prefix cache asks (radix/adapter/requests.py)."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    def load(self, req: Any) -> tuple[int, Any] | None:
        """See `load`."""
        return load(self._rt, req)

    def slots_of(self, req: Any) -> torch.Tensor | None:
        """Slots that continue what the request's row shares; None where there are none."""
        state = known_state(req)
        unpacking = pending(self._rt, state) if state is not None else None
        return unpacking.slots if unpacking is not None else None

    def reset(self) -> None:
        """The cache was flushed."""
        assert self._rt.originals is not None
        self._rt.originals.reset()


def load(rt: Runtime, req: Any) -> tuple[int, Any] | None:
    """Brings the originals back into fresh slots: (tokens, the node that the row's shared part ends with); None when
    the pool has no room. What the prefix cache still has raw of the history is copied."""
    originals, state = rt.originals, known_state(req)
    assert originals is not None and state is not None
    unpacking = originals.unpacking[state]
    view = unpacking.view[1]
    count = unpacking.end - unpacking.start
    lock = rt.tree.lock(view) if isinstance(view, Span) else None  # making room must not evict what is copied
    if unpacking.last is not None:
        originals.hold(state, unpacking.last)
    slots = None
    try:
        slots = allocate(rt, count)
        if slots is not None:
            with on_forward_stream(rt.scheduler):
                _fill(rt, originals, unpacking, slots)
            if rt.slot_tokens is not None:
                tokens = req.full_untruncated_fill_ids[unpacking.start : unpacking.end]
                rt.slot_tokens.write(slots, torch.tensor(tokens))
            unpacking.slots = slots
    except Exception as error:  # inside SGLang's adder, where nobody would catch it
        guard.note("unpack", error)
        unpacking.error = True
        if slots is not None:
            rt.allocator.free(slots)
    finally:
        if lock is not None:
            rt.tree.unlock(lock)
    if unpacking.slots is None:
        unpacking.failed = True
        originals.release(state)
        return None
    originals.unpacked_slots += count
    return count, req.last_node


def _fill(rt: Runtime, originals: Originals, unpacking: Unpacking, slots: torch.Tensor) -> None:
    start, end, last = unpacking.start, unpacking.end, unpacking.last
    archived = min(max(last.path_tokens if last is not None else 0, start), end)
    if last is not None and archived > start:
        originals.read(last, start, slots[: archived - start])
    if archived < end:
        matched, node = unpacking.view[:2]
        cached = rt.tree.path_device_indices(node)
        cached = cached[len(cached) - (matched - archived) :][: end - archived]
        originals.copy(cached, slots[archived - start :])
    if isinstance(unpacking.view[1], Span):
        _copy_protected(originals, unpacking.view[1], start, archived, slots)
    for layer in range(rt.kv_pool.layer_num):
        rt.votes.reset(layer, slots)
    if rt.cells is not None:
        rt.cells.reset(slots)


def _copy_protected(originals: Originals, entry: Span, start: int, archived: int, slots: torch.Tensor) -> None:
    """What is protected is bit for bit what was computed, whatever the codec: a compressed span has it first, as it
    was; a raw one has every token in its place."""
    if originals.store.exact:
        return
    tokens, source = stream.protected_slots(entry, start, archived)
    if len(tokens):
        originals.copy(source, slots[on_device(tokens - start, slots.device)])


def settle(rt: Runtime, state: RequestState) -> None:
    """The request's row has its slots: from here on it is one that nothing was compressed of."""
    if rt.originals is None:
        return
    unpacking = rt.originals.unpacking.pop(state, None)
    if unpacking is None:
        if (counter := rt.originals.missed.pop(state, None)) is not None:
            setattr(rt.counters, counter, getattr(rt.counters, counter) + 1)
        return
    rt.originals.rows[state] = unpacking.end - unpacking.start
    rt.counters.unpacked += unpacking.end > unpacking.start
    rt.counters.unpacked_tokens += unpacking.end - unpacking.start


def archive(rt: Runtime, req: Any, state: RequestState, end: int) -> None:
    """Keeps the originals of the row's tokens up to logical `end` that are not archived yet. Call before they are
    merged: later is too late. An error of ours costs the originals, never the request."""
    if rt.originals is None or state.broken or req.skip_radix_cache_insert:
        return
    try:
        _archive(rt, rt.originals, req, state, end)
    except Exception as error:
        guard.note("archive", error)


def _archive(rt: Runtime, originals: Originals, req: Any, state: RequestState, end: int) -> None:
    tokens = logical_tokens(req)[:end]
    if len(tokens) < end:  # some of them are behind a stop
        return
    keyed = state.protection.keyed(tokens)
    last = originals.held(state) or originals.covers(state.namespace, keyed, end)
    first = last.path_tokens if last is not None else 0
    if first >= end:
        return
    # From here on each token has a slot that nothing was merged into.
    if first < (state.counted_tokens if state.offset else 0):
        rt.counters.archive_gaps += 1
        return
    if last is not None:
        originals.hold(state, last)
    row = rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, first - state.offset : end - state.offset]
    slots = row.to(torch.int64)
    if rt.slot_tokens is not None and not rt.slot_tokens.hold(slots, tokens[first:]):
        rt.requests.mispublished(req, "its slots hold other tokens than would be archived")
        return
    with on_forward_stream(rt.scheduler):
        pure = not state.offset or state.streamed
        last = originals.archive(last, state.namespace, keyed[first:], slots, pure)
    if last is not None:
        originals.hold(state, last)


def archive_unused(rt: Runtime, namespace: Any, tokens: array[int], slots: torch.Tensor) -> None:
    """The same of a cached prefix that no request uses. slots: of the last of `tokens`, one each; nothing is archived
    where those before them are not."""
    if rt.originals is None:
        return
    try:
        last = rt.originals.covers(namespace, tokens, len(tokens))
        first = last.path_tokens if last is not None else 0
        if not len(tokens) - len(slots) <= first < len(tokens):
            return
        if last is not None:
            rt.originals.hold(namespace, last)
        own = slots[len(slots) - (len(tokens) - first) :].to(torch.int64)
        with on_forward_stream(rt.scheduler):
            rt.originals.archive(last, namespace, tokens[first:], own, pure=len(slots) == len(tokens))
    except Exception as error:
        guard.note("archive", error)
    finally:
        rt.originals.release(namespace)


def most_cached(req: Any) -> int:
    """Most tokens of its text that a request can take from a cache: SGLang's Req._compute_max_prefix_len."""
    most = len(req.full_untruncated_fill_ids) - 1
    return min(most, req.logprob_start_len) if req.return_logprob and req.logprob_start_len >= 0 else most


def _matched(rt: Runtime, node: Any, tokens: int) -> Matched:
    if not isinstance(node, Span):
        return Matched(tokens, tokens, 0, compressed=False)
    _, whole, carried = rt.tree.raw_tail_start(node)
    return Matched(node.anchor_len, tokens, whole + carried, compressed=node.path_slots < node.path_tokens)
