"""KV events for compressed spans, in SGLang's own format, so that a cache-aware router sees compressed prefixes.

A router only asks which tokens a server has, so a span is announced like uncompressed tokens: one block per token,
hashed by SGLang's own code from the first token of the prompt on. The same tokens may be cached twice (uncompressed and
in spans of several configurations): a block is reported removed when its last copy is gone.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey

from keepkv_sglang.radix.span import Span


@dataclass(slots=True)
class EventNode:
    """What SGLang's recorder reads of a tree node; it keeps its hashes in it."""

    parent: EventNode | None
    key: RadixKey
    hash_value: list[str] | None = None
    event_hash_value: list[str] | None = None


class SpanEvents:
    """The queue of a cache's events: those of SGLang's tree, and ours between them, in order of time."""

    def __init__(self, core: Any, *, page_size: int, dynamo_format: bool, lora_names: Any) -> None:
        self._core = core
        self._recorder = KVCacheEventRecorder(
            enabled=True, page_size=page_size, dynamo_format=dynamo_format, lora_names=lora_names
        )
        self._queue: list[Any] = []
        self._copies: Counter[int] = Counter()  # block hash -> copies in both trees

    def stored(self, span: Span, prompt: array[int], extra_key: str | None, cache_salt: str | None) -> None:
        """A span was added; prompt: all tokens up to its end."""
        if span.parent is not None:
            parent = span.parent.meta
        else:
            root = EventNode(None, RadixKey(array("q"), extra_key, cache_salt=cache_salt), [])
            parent = root
            if span.anchor_len:
                key = RadixKey(prompt[: span.anchor_len], extra_key, cache_salt=cache_salt)
                parent = EventNode(root, key)
                self._recorder._node_event_hash_values(parent)
        span.meta = EventNode(parent, RadixKey(span.tokens, extra_key, cache_salt=cache_salt))
        self._pull()
        self._recorder.record_store(span.meta)
        self._take(self._recorder.take())

    def removed(self, span: Span) -> None:
        """A span is gone."""
        self._pull()
        self._recorder.record_remove(span.meta)
        self._take(self._recorder.take())

    def take(self) -> list[Any]:
        """All events since the last call."""
        self._pull()
        queue, self._queue = self._queue, []
        return queue

    def _pull(self) -> None:
        self._take(self._core.take_events())

    def _take(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._copies.clear()
            elif isinstance(event, BlockStored):
                self._copies.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                event.block_hashes = [block for block in event.block_hashes if self._last_copy(block)]
                if not event.block_hashes:
                    continue
            self._queue.append(event)

    def _last_copy(self, block: int) -> bool:
        self._copies[block] -= 1
        if self._copies[block] > 0:
            return False
        del self._copies[block]
        return True
