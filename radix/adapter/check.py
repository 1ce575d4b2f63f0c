"""Every invariant of ../README.md over both trees: for tests, not for serving."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from keepkv_sglang.radix.invariants import check_slots, check_tree


def check_cache(cache: Any, running: Iterable[int] | None) -> None:
    """AssertionError names the invariant that fails. cache: a KeepKVRadixCache. running: as in its check()."""
    check_tree(cache.spans, lambda slots: slots.tolist())
    for span in cache.spans.spans():
        if span.anchor is not None:
            info = cache.path_of(span.anchor)[-1]  # KeyError: the anchor is gone
            assert info.path_end == span.anchor_len, f"I8: anchor {info} of {span!r} ends elsewhere"
    allocator = cache.token_to_kv_pool_allocator
    owners = {
        "the free list": allocator.get_all_free_pages().tolist(),
        "SGLang's tree": cache.tree_core.all_values_flatten().tolist(),
        "spans": [slot for span in cache.spans.spans() for slot in span.slots.tolist()],
    }
    check_slots(int(allocator.size), {**owners, "running requests": running or ()})
    assert running is not None or not (cache.nodes.any_locked() or cache.spans.protected_slots), "I2: locked at idle"
