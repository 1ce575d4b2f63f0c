"""KV events of spans, without a server: every block that was announced is taken back once."""

from __future__ import annotations

from array import array
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.events import KvEventLoraNames
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from keepkv_sglang.radix.adapter.events import SpanEvents
from keepkv_sglang.radix.tree import SpanTree

PROMPT = array("q", range(1000, 1040))


@lru_cache
def core_hashes(extra_key: str | None, salt: str | None) -> list[int]:
    """What SGLang's own tree announces for PROMPT."""
    allocator = TokenToKVPoolAllocator(64, torch.float32, "cpu", None, False)
    params = CacheInitParams(
        disable=False, req_to_token_pool=ReqToTokenPool(2, 64, "cpu", False), token_to_kv_pool_allocator=allocator,
        page_size=1, tree_components=(ComponentType.FULL,), enable_kv_cache_events=True,
    )  # fmt: skip
    cache = UnifiedRadixCache(params)
    key = RadixKey(PROMPT, extra_key, cache_salt=salt)
    cache.insert(InsertParams(key=key, value=allocator.alloc(len(PROMPT))))
    return stored(cache.take_events())


def hashes(tokens: array) -> list[int]:
    assert tokens == PROMPT
    return core_hashes(None, None)


class World:
    def __init__(self, core_events: list | None = None) -> None:
        self.from_core = core_events or []
        core = SimpleNamespace(take_events=self.take_core)
        self.events = SpanEvents(core, dynamo_format=False, lora_names=KvEventLoraNames())
        self.tree = SpanTree()

    def take_core(self) -> list:
        events, self.from_core = self.from_core, []
        return events

    def span(self, parent, anchor, anchor_len, end, salt=None, raw=True):
        first = parent.path_tokens if parent is not None else anchor_len
        span, _ = self.tree.insert(
            parent=parent, anchor=anchor, anchor_len=anchor_len, namespace=salt, tokens=PROMPT[first:end],
            slots=None, m=end - first, raw=raw,
        )  # fmt: skip
        self.events.stored(span, PROMPT[:end], None, salt)
        return span

    def remove(self, span) -> None:
        self.tree.remove(span)
        self.events.removed(span)


def stored(events: list) -> list[int]:
    return [block for event in events if isinstance(event, BlockStored) for block in event.block_hashes]


def removed(events: list) -> list[int]:
    return [block for event in events if isinstance(event, BlockRemoved) for block in event.block_hashes]


def test_blocks_carry_the_hashes_of_uncompressed_tokens_and_hang_together():
    world = World()
    below = world.span(world.span(None, "anchor", 8, 20), "anchor", 8, 33)
    events = world.events.take()
    assert stored(events) == hashes(PROMPT)[8:33]
    assert events[0].parent_block_hash == hashes(PROMPT)[7] and events[1].parent_block_hash == hashes(PROMPT)[19]
    assert [list(event.token_ids) for event in events] == [list(PROMPT[8:20]), list(PROMPT[20:33])]
    world.remove(below)
    assert removed(world.events.take()) == hashes(PROMPT)[20:33]


def test_a_split_span_takes_back_each_half_with_its_half():
    world = World()
    upper = world.span(None, None, 0, 30)
    below = world.span(upper, None, 0, 40)
    world.events.take()
    parts = world.tree.split(upper, 12, None, None)
    world.events.split(*parts)
    upper, lower = parts
    again = world.span(lower, None, 0, 35)  # hashes go on behind the lower half
    assert stored(world.events.take()) == hashes(PROMPT)[30:35]
    for span, expected in ((again, []), (below, range(30, 40)), (lower, range(12, 30)), (upper, range(12))):
        world.remove(span)
        assert removed(world.events.take()) == [hashes(PROMPT)[i] for i in expected]


def test_a_joined_span_announces_what_is_new_and_takes_back_what_its_parts_are():
    world = World()
    span = world.span(world.span(None, "anchor", 8, 20), "anchor", 8, 23)
    world.events.take()
    for end in (25, 33):
        assert world.tree.join(span, PROMPT[span.path_tokens : end], list(range(end - 20)))
        world.events.joined(span, end - 20 - span.borders[-1])
    events = world.events.take()
    assert stored(events) == hashes(PROMPT)[23:33]
    assert events[0].parent_block_hash == hashes(PROMPT)[22]
    assert [token for event in events for token in event.token_ids] == list(PROMPT[23:33])
    world.tree._on_split = world.events.split
    upper = world.tree.match([("anchor", 8)], None, [*PROMPT[:25], 1])
    assert upper is span.parent and upper.path_tokens == 25
    below = world.span(span, "anchor", 8, 40)
    assert stored(world.events.take()) == hashes(PROMPT)[33:40]
    for gone, expected in ((below, range(33, 40)), (span, range(25, 33)), (upper, range(20, 25))):
        world.remove(gone)
        assert removed(world.events.take()) == [hashes(PROMPT)[i] for i in expected]


def test_a_block_is_removed_with_its_last_copy():
    block = hashes(PROMPT)[0]
    from_core = BlockStored(
        block_hashes=[block], parent_block_hash=None, token_ids=[1000], block_size=1, lora_id=None, medium="GPU"
    )
    world = World([from_core])
    span = world.span(None, None, 0, 3)
    world.from_core = [BlockRemoved(block_hashes=[block], medium="GPU")]
    assert removed(world.events.take()) == []
    world.remove(span)
    assert removed(world.events.take()) == hashes(PROMPT)[:3]


@pytest.mark.parametrize("extra_key", [None, "tenant"])
@pytest.mark.parametrize("salt", [None, "salt"])
def test_a_namespaces_blocks_are_those_of_sglangs_tree(extra_key, salt):
    world = World()
    for anchor, anchor_len in ((None, 0), ("anchor", 8)):
        span, _ = world.tree.insert(
            parent=None, anchor=anchor, anchor_len=anchor_len, namespace=(extra_key, salt),
            tokens=PROMPT[anchor_len:], slots=None, m=1,
        )  # fmt: skip
        world.events.stored(span, PROMPT, extra_key, salt)
        assert stored(world.events.take()) == core_hashes(extra_key, salt)[anchor_len:]
    assert (core_hashes(extra_key, salt) == core_hashes(None, None)) == (salt is None)
