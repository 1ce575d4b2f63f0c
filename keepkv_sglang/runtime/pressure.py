"""Compress before evict: when free slots run low, cold uncompressed prefixes are merged between steps.

SGLang's tree keeps uncompressed what KeepKV never compresses by itself: anchors (system prompts) and the prompts of
requests that switched it off. Without this module they are evicted when memory is needed; here they become spans of the
server's own configuration, at its budget, and later requests of that configuration find them. evict() itself only
drops: a merge needs slots of its own and time, so it is done here, at most `pressure_tokens` tokens per step.

No request runs over such a prefix, so it has no queries: those of a fixed text stand in (memory/calibration.py).
"""

from __future__ import annotations

import logging
import time
from array import array
from itertools import islice
from typing import Any

from keepkv_sglang.radix.nodes import Node
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree
from keepkv_sglang.runtime.compressor import merge_unused
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.unpack import archive_unused
from keepkv_sglang.runtime.watched import PRESSURE

logger = logging.getLogger("keepkv")

MOST_LOOKED_AT = 16  # nodes per step that turn out not to be merged


def relieve(rt: Runtime) -> bool:
    """Merges cold nodes of SGLang's tree, then cold raw spans of ours, until enough slots are free or one step's budget
    is spent. Call between steps. True when something was merged.

    A budget in slots is a request's, not a prefix's: a server started with one merges nothing here.
    """
    config, tree = rt.config, rt.tree
    if rt.pressure_key is None or tree.disable:
        return False
    merged = rt.counters.pressure_merges
    wanted = int(config.pressure_free * rt.limits.capacity) + _about_to_be_needed(rt)
    left, looks = config.pressure_tokens, MOST_LOOKED_AT
    while rt.allocator.available_size() < wanted and looks and left >= config.min_tokens:
        found = tree.nodes.coldest()
        if found is None:
            break
        node_id, node = found
        if not is_cold(tree.spans, node.usage.last_access):
            tree.nodes.put_back(node_id)
            break
        done = _merge_node(rt, node_id, node, left)
        if done is None:
            tree.nodes.put_back(node_id)
            break
        left -= done
        looks -= done == 0
    for serial in list(islice(tree.book.raw, looks)):
        if rt.allocator.available_size() >= wanted or left < config.min_tokens:
            break
        span = tree.book.raw.pop(serial, None)
        if span is None or not span.raw or span.n < config.min_tokens:
            continue  # evicted to make room for the one before, or forgotten
        left -= _merge_raw_span(rt, span, left)
        if span.raw:
            tree.book.raw[serial] = span  # behind the others: looked at again after them
    return bool(rt.counters.pressure_merges > merged)


def piece_of(length: int, most: int, least: int) -> int:
    """Tokens to merge at the end of a node: all, or at most `most`, with neither part below `least`; 0: impossible."""
    if length <= most:
        return length
    n = min(most, length - least)
    return n if n >= least else 0


def _about_to_be_needed(rt: Runtime) -> int:
    """Slots that the next prefill may take: without them it would evict what could have been merged."""
    scheduler = rt.scheduler
    waiting = sum(len(req.origin_input_ids) for req in scheduler.waiting_queue[:MOST_LOOKED_AT])
    if scheduler.chunked_req is not None:
        waiting += len(scheduler.chunked_req.origin_input_ids)
    return min(waiting, rt.limits.chunk_tokens or scheduler.max_prefill_tokens)


def is_cold(spans: SpanTree, last_access: int) -> bool:
    """Not used for more than twice the mean age of the cache's spans: out of the working set.

    Where n conversations take turns, ages spread evenly from 0 to one round and twice their mean is a whole round: what
    takes part stays uncompressed.
    """
    return spans.now - last_access > 2 * spans.mean_age


def worth_merging(n: int, m: int, hits: int, merge_flops: float, prefill_flops: float) -> bool:
    """The cheaper-than-recompute rule: merging n tokens into m slots costs less than it is expected to save.

    merge_flops: per pair of dropped and kept token (all layers and kv heads); prefill_flops: per token. The search for
    the nearest kept key compares (n - m) with m keys, so it grows with n^2; prefilling n tokens again grows with n. The
    prefix is asked for again with probability (hits + 1) / (hits + 2): Laplace's rule, 1/2 for one never used again.
    Counts only, no clock: tensor-parallel ranks must decide alike.
    """
    again = (hits + 1) / (hits + 2)
    return m < n and merge_flops * (n - m) * m <= again * prefill_flops * n


def _merge_node(rt: Runtime, node_id: int, node: Node, most: int) -> int | None:
    """Merges up to `most` tokens at the node's end; returns how many, 0 if it stays as it is, None: in the next step.

    A longer node is cut and its end merged first; the rest is the next coldest. A node that is not merged leaves the
    queue of cold nodes until it is used again, unlocked, or its last child is gone.
    """
    config, tree = rt.config, rt.tree
    if not tree.evictable_leaf(node_id) or not tree.cold.known_path(node_id):
        return 0
    info = tree.path_of(node_id)[-1]
    start, end = info.path_start, info.path_end
    if node.protected or _server_protects(rt, node_id, start, end):
        return 0  # it is evicted in its turn
    if end - start < config.min_tokens:
        if start and not tree.spans.has_anchor(node_id):
            tree.evict_node(node_id)  # a short end, such as a reply: it keeps the rest from being merged
        return 0
    n = piece_of(end - start, most, config.min_tokens)
    if n == 0:
        return None if most < config.pressure_tokens else 0
    cut = end - n
    m = config.kept_slots(0, n)
    if not worth_merging(n, m, node.usage.hits, rt.merge_flops, rt.prefill_flops):
        return 0
    began = time.perf_counter()
    target = _slots_beside(rt, node_id, m)
    if target is None:
        return 0
    if cut > start:
        tree.cold.split_node(node_id, cut)
    namespace, path = (*node.scope, rt.pressure_key), tree.path_device_indices(node_id)
    archive_unused(rt, namespace, tree.cold.prompt_of(node_id), path)
    _merge_into(rt, path, cut, end, target)
    tree.cold.replace_node(node_id, namespace, target)
    _count(rt, n, m, began)
    return n


def _server_protects(rt: Runtime, node_id: int, start: int, end: int) -> bool:
    """Whether --keepkv-protect or --keepkv-fair marks any of a node's tokens: then no request of the server's
    configuration would find them merged."""
    if not (rt.config.protect or rt.config.fair):
        return False
    prompt = rt.tree.cold.prompt_of(node_id)
    if rt.limits.border is not None:
        prompt.extend(
            [-1] * (rt.limits.border.trailing + 1)
        )  # the first message is one also where its node ends with it
    return rt.requests.protection_of(rt.config, prompt).touches(start, end)


def _merge_raw_span(rt: Runtime, span: Span, most: int) -> int:
    """Merges up to `most` tokens at the end of a raw span of the server's configuration; returns how many.

    Raw spans are turns that found no room for their queries, and turns below min_tokens; those stay as they are.
    """
    config, tree = rt.config, rt.tree
    n = min(span.n, most)
    m = config.kept_slots(0, n)
    if span.lock_ref or not is_cold(tree.spans, span.last_access):
        return 0
    if not worth_merging(n, m, span.hits, rt.merge_flops, rt.prefill_flops):
        return 0
    began = time.perf_counter()
    target = _slots_beside(rt, span, m)
    if target is None:
        return 0
    if n < span.n and not tree.cold.split_span(span, span.n - n):
        rt.allocator.free(target)
        return 0
    path = tree.path_device_indices(span)
    _archive_raw_span(rt, span, path)
    _merge_into(rt, path, len(path) - n, span.path_tokens, target)
    rt.allocator.free(tree.spans.replace(span, target, m))
    _count(rt, n, m, began)
    return n


def _archive_raw_span(rt: Runtime, span: Span, path: Any) -> None:
    """Its originals, and those of what is whole in front of it; path: the slots of its chain. The marks of what a
    request protects in the anchor are not known here: then nothing is found that this could follow."""
    tree = rt.tree
    if rt.originals is None or (span.anchor is not None and not tree.cold.known_path(span.anchor)):
        return
    tokens = tree.cold.prompt_of(span.anchor) if span.anchor is not None else array("q")
    for link in span.path():
        tokens.extend(link.tokens)
    _, whole, carried = tree.raw_tail_start(span)
    raw = len(tokens) if span.path_slots == span.path_tokens else span.path_tokens - whole - carried
    if raw > 0:
        archive_unused(rt, span.namespace, tokens, path[len(path) - raw :])


def _merge_into(rt: Runtime, path: Any, start: int, end: int, target: Any) -> None:
    """compressor.merge_unused at the server's settings. When it raises, `target` is free again and nothing else has
    changed."""
    try:
        merge_unused(rt, rt.config, path, start, end, target)
    except Exception:
        rt.allocator.free(target)
        raise


def _count(rt: Runtime, tokens: int, slots: int, began: float) -> None:
    seconds = time.perf_counter() - began
    rt.counters.pressure_merges += 1
    rt.counters.pressure_tokens += tokens
    rt.counters.pressure_seconds += seconds
    if rt.watched is not None:
        rt.watched.seconds.append((PRESSURE, seconds))
    logger.debug("pressure: %d cold tokens have %d slots, in %.1f ms", tokens, slots, 1e3 * seconds)


def _slots_beside(rt: Runtime, node: int | Span, count: int) -> Any:
    """Fresh slots, int64 [count]; where none are free, entries that are next in line make room. None if there are none.

    The node or span is locked meanwhile: what is about to be merged must not be evicted to make room for it.
    """
    lock = rt.tree.lock(node)
    try:
        if rt.allocator.available_size() < count:
            rt.tree.evict_slots(count - rt.allocator.available_size())
        slots = rt.allocator.alloc(count)
    finally:
        rt.tree.unlock(lock)
    return None if slots is None else slots.long()
