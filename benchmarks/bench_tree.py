"""SpanTree against SGLang's RadixCache on the same keys, in one process: `python benchmarks/bench_tree.py`.

50,000 spans of 20 tokens: 250 unrelated keys of 4,000 tokens, each a chain of 200 spans. RadixCache gets the
same keys grown 20 tokens at a time, so that it holds the same 50,000 nodes (building them takes a minute). A
second table keeps each key as one span. Medians in microseconds per call over shuffled keys.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

KEYS, KEY_TOKENS = 250, 4000
VOCABULARY = 150_000
NO_ANCHOR = [(None, 0)]
Call = Callable[[Any], Any]


def make_keys(rng: random.Random) -> list[array[int]]:
    """KEYS random keys, unrelated from their first tokens on, as conversations are past the anchor."""
    return [array("q", (rng.randrange(VOCABULARY) for _ in range(KEY_TOKENS))) for _ in range(KEYS)]


def extend(tree: SpanTree, parent: Span | None, tokens: Sequence[int]) -> Span:
    """One more span, half as many slots as tokens."""
    return tree.insert(
        parent=parent, anchor=None, anchor_len=0, namespace="", tokens=tokens, slots=None, m=len(tokens) // 2
    )[0]


def build_ours(keys: list[array[int]], span_tokens: int) -> tuple[SpanTree, list[Span]]:
    """The tree and the last span of each key."""
    tree, leaves = SpanTree(), []
    for key in keys:
        span = None
        for start in range(0, KEY_TOKENS, span_tokens):
            span = extend(tree, span, key[start : start + span_tokens])
        assert span is not None
        leaves.append(span)
    return tree, leaves


class SGLang:
    """RadixCache as SGLang builds it for simulation; values are slot tensors."""

    def __init__(self) -> None:
        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

        self._cache = RadixCache.create_simulated()
        self._values = torch.arange(2 * KEY_TOKENS, dtype=torch.int64)
        self._match, self._insert, self._key = MatchPrefixParams, InsertParams, RadixKey

    def insert(self, tokens: array[int]) -> None:
        value = self._values[: len(tokens)]
        self._cache.insert(self._insert(key=self._key(token_ids=tokens), value=value))

    def match(self, tokens: array[int]) -> int:
        return int(self._cache.match_prefix(self._match(key=self._key(token_ids=tokens))).device_prefix_len)


def microseconds(call: Call, arguments: Sequence[Any]) -> float:
    """Median time of call(argument)."""
    times = []
    for argument in arguments:
        begin = time.perf_counter_ns()
        call(argument)
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1000


def run(span_tokens: int) -> None:
    """Builds both trees and prints one table."""
    rng = random.Random(0)
    keys = make_keys(rng)
    tree, leaves = build_ours(keys, span_tokens)
    try:
        sglang: SGLang | None = SGLang()
    except ImportError as error:
        print(f"sglang is not here ({error}): our column only")
        sglang = None
    if sglang is not None:
        for key in keys:
            for end in range(span_tokens, KEY_TOKENS + 1, span_tokens):
                sglang.insert(key[:end])

    order = [rng.randrange(KEYS) for _ in range(2000)]
    longer = [keys[i] + array("q", [VOCABULARY + n]) * 20 for n, i in enumerate(order)]
    changed = [keys[i][:2010] + array("q", [-1]) + keys[i][2011:] for i in order]
    unknown = [array("q", [-2]) + keys[i][1:] for i in order]
    shared = 2010 // span_tokens * span_tokens
    found = [tree.match(NO_ANCHOR, "", key) for key in (longer[0], changed[0], unknown[0])]
    assert [span.path_tokens if span else 0 for span in found] == [KEY_TOKENS, shared, 0]
    assert sglang is None or sglang.match(longer[0]) == KEY_TOKENS

    print(f"\n{len(tree):,} spans of {span_tokens} tokens, chains of {KEY_TOKENS // span_tokens}; us per call")
    print(f"{'':46}{'SpanTree':>10}{'RadixCache':>12}")

    def row(name: str, ours: Callable[[Any], Any], theirs: Callable[[Any], Any] | None, keys: Sequence[Any]) -> None:
        our_time = microseconds(ours, keys)
        their_time = f"{microseconds(theirs, keys):12.1f}" if theirs and sglang else ""
        print(f"{name:46}{our_time:10.1f}{their_time}")

    def match(key: array[int]) -> Any:
        return tree.match(NO_ANCHOR, "", key)

    their_match = sglang.match if sglang else None
    row("match, all 4,000 tokens are there", match, their_match, longer)
    row("match, changed after 2,010 tokens", match, their_match, changed)
    row("match, unknown from the first token", match, their_match, unknown)
    # Ours gets the parent from the match of the same request; RadixCache walks down the key again.
    row(
        "insert of 20 tokens after the 4,000",
        lambda n: extend(tree, leaves[order[n]], longer[n][KEY_TOKENS:]),
        (lambda n: sglang.insert(longer[n])) if sglang else None,
        range(len(order)),
    )
    row(
        "lock and unlock of a whole chain",
        lambda n: (tree.lock(leaves[n]), tree.unlock(leaves[n])),
        None,
        order,
    )
    total = len(tree)
    begin = time.perf_counter()
    while (span := tree.oldest()) is not None:
        tree.remove(span)
    mean = (time.perf_counter() - begin) / total * 1e6
    print(f"{f'oldest and remove, mean over all {total:,}':46}{mean:10.1f}")


if __name__ == "__main__":
    for span_tokens in (20, KEY_TOKENS):
        run(span_tokens)
