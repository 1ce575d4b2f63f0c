"""KV events for compressed spans, in SGLang's own format, so that a cache-aware router sees compressed prefixes.

A router only asks which tokens a server has, so a span is announced like uncompressed tokens: one block per token,
hashed as SGLang does from the first token of the prompt on. The same tokens may be cached twice (uncompressed and
in spans of several configurations): a block is reported removed when its last copy is gone.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey

from keepkv_sglang.radix.marks import plain
from keepkv_sglang.radix.span import Span


def token_hashes(tokens: array[int], before: str | None) -> list[str]:
    """SGLang's SHA-256 chain of hashes for blocks of one token, as hex: hash(previous digest + uint32 of the token).

    before: the hash of the token in front of the first. SGLang's own function (get_hash_str) compiles C++ on
    its first call, which would stop the scheduler for many seconds.
    """
    digest, hashes = bytes.fromhex(before) if before else b"", []
    for token in tokens:
        digest = sha256(digest + token.to_bytes(4, "little")).digest()
        hashes.append(digest.hex())
    return hashes


def first_hash(cache_salt: str | None) -> str | None:
    """What a namespace's chains begin with, as in SGLang's compute_node_event_hash_values."""
    return sha256(b"sglang-cache-salt-v1\0" + cache_salt.encode()).hexdigest() if cache_salt is not None else None


@dataclass(slots=True)
class EventNode:
    """What SGLang's recorder reads of a tree node. hash_value: one hash per token of key."""

    parent: EventNode | None
    key: RadixKey
    hash_value: list[str]

    @property
    def event_hash_value(self) -> list[str]:
        return self.hash_value


class SpanEvents:
    """The queue of a cache's events: those of SGLang's tree, and ours between them, in order of time."""

    def __init__(self, core: Any, *, dynamo_format: bool, lora_names: Any) -> None:
        self._core = core
        self._recorder = KVCacheEventRecorder(
            enabled=True, page_size=1, dynamo_format=dynamo_format, lora_names=lora_names
        )
        self._queue: list[Any] = []
        self._copies: Counter[int] = Counter()  # block hash -> copies in both trees

    def stored(self, span: Span, prompt: array[int], extra_key: str | None, cache_salt: str | None) -> None:
        """A span was added; prompt: all tokens up to its end, without marks."""
        if span.parent is not None:
            parent = span.parent.meta
        else:
            root = EventNode(None, RadixKey(array("q"), extra_key, cache_salt=cache_salt), [])
            anchor = prompt[: span.anchor_len]
            hashes = token_hashes(anchor, first_hash(cache_salt))
            parent = EventNode(root, RadixKey(anchor, extra_key, cache_salt=cache_salt), hashes) if anchor else root
        before = parent.hash_value[-1] if parent.hash_value else first_hash(cache_salt)
        tokens = plain(span.tokens)
        key = RadixKey(tokens, extra_key, cache_salt=cache_salt)
        span.meta = EventNode(parent, key, token_hashes(tokens, before))
        self._pull()
        self._recorder.record_store(span.meta)
        self._take(self._recorder.take())

    def joined(self, span: Span, n: int) -> None:
        """The last n tokens of a span were appended to it."""
        node, tokens = span.meta, plain(span.tokens[-n:])
        extra_key, salt = node.key.extra_key, node.key.cache_salt
        hashes = token_hashes(tokens, node.hash_value[-1])
        self._pull()
        self._recorder.record_store(EventNode(node, RadixKey(tokens, extra_key, cache_salt=salt), hashes))
        self._take(self._recorder.take())
        node.key = RadixKey(plain(span.tokens), extra_key, cache_salt=salt)
        node.hash_value = node.hash_value + hashes

    def split(self, upper: Span, lower: Span) -> None:
        """A span was cut: no block changes, but each part must know its own. Children hold on to the lower's node."""
        node, at = lower.meta, upper.n
        extra_key, salt = node.key.extra_key, node.key.cache_salt
        key = RadixKey(plain(upper.tokens), extra_key, cache_salt=salt)
        upper.meta = EventNode(node.parent, key, node.hash_value[:at])
        node.parent, node.key = upper.meta, RadixKey(plain(lower.tokens), extra_key, cache_salt=salt)
        node.hash_value = node.hash_value[at:]

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
