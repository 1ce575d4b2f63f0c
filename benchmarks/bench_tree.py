"""SpanTree against SGLang's own prefix caches, on the same keys in one process: `python benchmarks/bench_tree.py`.

1,000,000 tokens in 50,000 spans of 20 tokens: 250 unrelated keys of 4,000 tokens, each a chain of 200 spans. SGLang's
caches get the same keys grown 20 tokens at a time, so that they hold the same 50,000 nodes (building takes minutes). A
second table keeps each key as one span. Medians in microseconds per call over shuffled keys, so that what else runs
on the machine disturbs little; still, compare the columns of one run only.

Rows with * must be within 2x of RadixCache; the last line says PASS or FAIL, and so does the exit status. Eviction
must not scan: with 10 times as many spans, evicting one may cost 3 times as much at most (a cold cache, a deeper heap).
A match or touch of a chain of thousands of tiny spans may cost 3 times UnifiedRadixCache's match of as many nodes. A
request's whole bookkeeping beside 8,000 idle namespaces may cost 1.2 times what it costs in an empty cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keepkv_sglang.radix.adapter.publish import insert_span
from keepkv_sglang.radix.order import ORDERS
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables

KEYS, KEY_TOKENS, SPAN_TOKENS = 250, 4000, 20
EVICTED = 10_000
VOCABULARY = 150_000
NO_ANCHOR = [(None, 0)]
LIMIT, SCAN_LIMIT, DEPTH_LIMIT, IDLE_LIMIT = 2.0, 3.0, 3.0, 1.2
DEPTHS = (10, 100, 1000, 3500)
IDLE = 8000
Call = Callable[[Any], Any]


def random_key(rng: random.Random, tokens: int = KEY_TOKENS) -> array[int]:
    """Unrelated from its first token on, as conversations are past the anchor."""
    return array("q", (rng.randrange(VOCABULARY) for _ in range(tokens)))


def extend(tree: SpanTree, parent: Span | None, tokens: Sequence[int]) -> Span:
    """One more span, half as many slots as tokens."""
    return tree.insert(
        parent=parent, anchor=None, anchor_len=0, namespace="", tokens=tokens, slots=None, m=len(tokens) // 2
    )[0]


def chain(tree: SpanTree, key: array[int], span_tokens: int) -> Span:
    """The whole key as spans of span_tokens; returns the last one."""
    span = None
    for start in range(0, len(key), span_tokens):
        span = extend(tree, span, key[start : start + span_tokens])
    assert span is not None
    return span


class SGLang:
    """One of SGLang's caches without a server; values are slot tensors, and freed slots go nowhere."""

    class Allocator:
        device = "cpu"

        def free(self, slots: Any) -> None: ...

        def free_segment(self, slots: Any, start_pos: int = 0) -> None: ...

    def __init__(self, unified: bool) -> None:
        import torch
        from sglang.srt.mem_cache import base_prefix_cache as base
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

        params = CacheInitParams(False, None, self.Allocator(), 1)  # type: ignore[arg-type]
        if unified:
            from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
            from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

            params.tree_components = (ComponentType.FULL,)
            self._cache: Any = UnifiedRadixCache(params)
        else:
            self._cache = RadixCache(params)
        self._values = torch.arange(3 * KEY_TOKENS, dtype=torch.int64)
        self._base, self._key = base, RadixKey

    def insert(self, tokens: array[int]) -> None:
        self._cache.insert(self._base.InsertParams(key=self._key(token_ids=tokens), value=self._values[: len(tokens)]))

    def grow(self, key: array[int], step: int) -> None:
        """The key in nodes of `step` tokens."""
        for end in range(step, len(key) + 1, step):
            self.insert(key[:end])

    def match(self, tokens: array[int]) -> int:
        params = self._base.MatchPrefixParams(key=self._key(token_ids=tokens))
        return int(self._cache.match_prefix(params).device_prefix_len)

    def evict(self, tokens: int) -> None:
        self._cache.evict(self._base.EvictParams(num_tokens=tokens))


def median_us(call: Call, arguments: Sequence[Any], clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """Median time of call(argument) in microseconds."""
    times = []
    for argument in arguments:
        begin = clock()
        call(argument)
        times.append(clock() - begin)
    return statistics.median(times) / 1000


def mean_us(call: Callable[[], Any], count: int) -> float:
    """Time of one call() that does `count` things, for each of them."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) / count * 1e6


class Report:
    """Rows of all tables, and what they break. title: of the table that is being filled."""

    def __init__(self, have_sglang: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self._have_sglang = have_sglang
        self.title = ""

    def show(self) -> None:
        """Prints the rows of the table that is being filled."""
        rows = [[*row.values()][1:] for row in self.rows if row["table"] == self.title]
        lines = [
            (name, *(us and f"{us:.1f}" for us in times), ratio and f"{ratio:.2f}") for name, *times, ratio in rows
        ]
        columns = "us per call", "SpanTree", "RadixCache", "Unified", "ratio"
        print(f"\n{self.title}\n\n{tables.plain(columns, lines)}", flush=True)

    def row(
        self, name: str, ours: float, radix: float | None = None, unified: float | None = None, limit: float = 0.0
    ) -> None:
        """ratio: ours to RadixCache, or to Unified without it. What has a limit, or a name with *, is under a rule."""
        other = radix if radix is not None else unified
        ratio = ours / other if other else None
        limit = LIMIT if name.endswith("*") else limit
        self.rows.append({"table": self.title, "row": name, "span_tree_us": ours, "radix_cache_us": radix,
                          "unified_radix_cache_us": unified, "ratio": ratio})  # fmt: skip
        if limit and ratio is not None and ratio > limit:
            self.broken.append(f"{name.rstrip(' *')}: {ratio:.2f}x, at most {limit:g}x ({self.title})")


def evict_next(tree: SpanTree) -> None:
    span = tree.oldest()
    assert span is not None
    tree.remove(span)


def request_table(report: Report, span_tokens: int) -> None:
    """What a request costs, on a tree of 1,000,000 tokens."""
    rng = random.Random(0)
    keys = [random_key(rng) for _ in range(KEYS)]
    tree = SpanTree()
    leaves = [chain(tree, key, span_tokens) for key in keys]
    theirs = [SGLang(unified=False), SGLang(unified=True)] if report._have_sglang else []
    for cache in theirs:
        for key in keys:
            cache.grow(key, span_tokens)

    order = [rng.randrange(KEYS) for _ in range(2000)]
    longer = [keys[i] + array("q", [VOCABULARY + n]) * 20 for n, i in enumerate(order)]
    changed = [keys[i][:2010] + array("q", [-1]) + keys[i][2011:] for i in order]
    unknown = [array("q", [-2]) + keys[i][1:] for i in order]
    shared = 2010 // span_tokens * span_tokens
    found = [tree.match(NO_ANCHOR, "", key) for key in (longer[0], changed[0], unknown[0])]
    assert [span.path_tokens if span else 0 for span in found] == [KEY_TOKENS, shared, 0]
    assert all(cache.match(longer[0]) == KEY_TOKENS for cache in theirs)

    report.title = f"{len(tree):,} spans of {span_tokens} tokens, chains of {KEY_TOKENS // span_tokens}"

    def row(name: str, ours: Call, others: Callable[[SGLang], Call] | None, arguments: Sequence[Any]) -> None:
        report.row(name, median_us(ours, arguments), *(median_us(others(c), arguments) for c in theirs if others))

    def match(key: array[int]) -> Any:
        return tree.match(NO_ANCHOR, "", key)

    row("match, all 4,000 tokens are there *", match, lambda c: c.match, longer)
    row("match, changed after 2,010 tokens *", match, lambda c: c.match, changed)
    row("match, unknown from the first token *", match, lambda c: c.match, unknown)
    # Ours gets the parent from the match of the same request; theirs walk down the key again.
    numbers = range(len(order))
    row(
        "insert of 20 tokens after the 4,000 *",
        lambda n: extend(tree, leaves[order[n]], longer[n][KEY_TOKENS:]),
        lambda c: lambda n: c.insert(longer[n]),
        numbers,
    )
    new = [random_key(rng) for _ in range(200)]
    row("insert of a new key, as one span *", lambda key: extend(tree, None, key), lambda c: c.insert, new)
    row("insert of the same key again *", lambda key: extend(tree, None, key), lambda c: c.insert, new)
    if span_tokens < KEY_TOKENS:
        new = [random_key(rng) for _ in range(50)]
        row(
            "insert of a new key, in 200 steps of 20 tokens *",
            lambda key: chain(tree, key, span_tokens),
            lambda c: lambda key: c.grow(key, span_tokens),
            new,
        )
        new = [random_key(rng) for _ in range(50)]
        row("the same, against one insert of the whole key", lambda key: chain(tree, key, span_tokens),
            lambda c: c.insert, new)  # fmt: skip
        row("insert again, 200 spans against one insert", lambda key: chain(tree, key, span_tokens),
            lambda c: c.insert, [keys[i] for i in order[:200]])  # fmt: skip
    row("lock and unlock of a whole chain", lambda n: (tree.lock(leaves[n]), tree.unlock(leaves[n])), None, order)


def eviction_table(report: Report) -> None:
    """10,000 spans of 20 tokens go, of 50,000 without children: the case in which a scan would hurt most."""
    rng = random.Random(1)
    keys = [random_key(rng, SPAN_TOKENS) for _ in range(5 * EVICTED)]

    def evicting(policy: str, spans: int, gone: int) -> tuple[float, float]:
        """Mean and median; a scan would show in the median, other processes only in the mean."""
        tree = SpanTree(policy)
        for key in keys[:spans]:
            extend(tree, None, key)
        medians: list[float] = []
        mean = mean_us(lambda: medians.append(median_us(evict_next, [tree] * gone)), gone)
        return mean, medians[0]

    def theirs(at_once: int) -> list[float]:
        """Their caches, told to give `at_once` tokens until all 10,000 nodes are gone; us per node."""
        if not report._have_sglang:
            return []
        times = []
        for cache in (SGLang(unified=False), SGLang(unified=True)):
            for key in keys:
                cache.insert(key)
            calls = max(1, min(100, EVICTED * SPAN_TOKENS // at_once))
            nodes = calls * at_once // SPAN_TOKENS
            times.append(mean_us(lambda c=cache, n=calls: [c.evict(at_once) for _ in range(n)], nodes))  # type: ignore[misc]
        return times

    report.title = "50,000 spans without children; eviction of 10,000, us per span"
    ours = {policy: evicting(policy, 5 * EVICTED, EVICTED) for policy in ORDERS}
    report.row("lru, against one evict() of 200,000 tokens", ours["lru"][0], *theirs(EVICTED * SPAN_TOKENS))
    report.row("lru, against evict() of 20 tokens each time", ours["lru"][0], *theirs(SPAN_TOKENS))
    for policy in ORDERS:
        if policy != "lru":
            report.row(policy, ours[policy][0])
    for policy in ORDERS:
        grown = ours[policy][1] / evicting(policy, EVICTED // 2, EVICTED // 10)[1]
        if grown > SCAN_LIMIT:
            report.broken.append(f"{policy}: evicting costs {grown:.1f} times as much with 10 times the spans")


def nested_table(report: Report) -> None:
    """Thousands of lengths below one parent that begin alike: the worst case of a match."""
    rng = random.Random(2)
    key = random_key(rng, 6000)
    lengths = range(32, 5032)
    report.title = "match with 5,000 children of 32 to 5,031 tokens below one parent, all beginning alike"
    for name, last, child in (
        ("none of them is in the key", -1, False),
        ("all of them are in the key", None, False),
        ("all of them are in the key and have a child each", None, True),
    ):
        tree = SpanTree()
        for n in lengths:
            span = extend(tree, None, key[:n] if last is None else key[: n - 1] + array("q", [last]))
            if child:
                extend(tree, span, array("q", [-5, n]))
        found = tree.match(NO_ANCHOR, "", key)
        assert (found.path_tokens if found else 0) == (lengths[-1] if last is None else 0)
        report.row(name, median_us(lambda k, t=tree: t.match(NO_ANCHOR, "", k), [key] * 20))  # type: ignore[misc]


def depth_table(report: Report) -> None:
    """Turns of a token or two: each a span below the last one's. `left`: beside it, what another turn goes on from."""
    report.title = f"chains of up to {DEPTHS[-1]:,} tiny spans, thread time"
    rng = random.Random(3)
    for name, own, left in (("2 tokens", 2, 0), ("3, beside 2 left raw", 3, 2)):
        key = random_key(rng, own * DEPTHS[-1] + 4)
        tree = SpanTree()
        place = {"anchor": None, "anchor_len": 0, "namespace": "", "slots": None}
        parent, begin = None, time.perf_counter()
        for at in range(0, own * DEPTHS[-1], own):
            end = at + own
            parent = tree.insert(parent=parent, tokens=key[at:end], m=1, lookahead=key[end : end + left], **place)[0]  # type: ignore[arg-type]
            if left:
                tree.insert(parent=parent, tokens=key[end : end + left], m=left, raw=True, **place)  # type: ignore[arg-type]
        report.row(f"{name}: insert, per turn", (time.perf_counter() - begin) / DEPTHS[-1] * 1e6)
        if unified := SGLang(unified=True) if report._have_sglang else None:
            unified.grow(key[: own * DEPTHS[-1]], own)
        calls: dict[str, Call] = {
            "match": lambda k, t=tree: t.match(NO_ANCHOR, "", k, touch=False),  # type: ignore[misc]
            "match and touch": lambda k, t=tree: t.match(NO_ANCHOR, "", k),  # type: ignore[misc]
        } | ({"": unified.match} if unified else {})
        for depth in DEPTHS:
            asked, best = [key[: own * depth + left] + array("q", [-1])] * 10, dict.fromkeys(calls, 1e9)
            for what in [*calls] * 10:  # taking turns, the best of ten: what else runs empties the processor's caches
                best[what] = min(best[what], median_us(calls[what], asked, time.thread_time_ns))
            for what in [*calls][:2]:
                report.row(f"{name}: {what}, {depth} deep", best[what], None, best.get(""), DEPTH_LIMIT)


def idle_table(report: Report) -> None:
    """Requests through the whole cache manager, without a model: an empty cache beside one of 8,000 idle namespaces."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    # SGLang and what brings it, where it is used: the other tables are printed without
    from keepkv_sglang.settings.config import KeepKVConfig
    from keepkv_sglang.tools.simulate.world import World
    from tests.support.served import OFF, Server, text

    report.title = f"one request's bookkeeping, {IDLE:,} idle namespaces (Unified: an empty cache), thread time"
    shared = text(0, 100)
    prompts = [[*shared, *text(10_000 * n, 900)] for n in range(1, 41)]
    names = {"": None, "salts": 0, "settings, other texts": 1, "settings, the same text": 2}
    worlds = {}
    for name, kind in names.items():
        config = KeepKVConfig(enabled=True, budget=0.25, window=32, recent=32)
        worlds[name] = world = World(config, slots=200_000, scale=1, longest=2000, rows=4)
        with world.running():
            for n in range(IDLE if name else 0):
                namespace = (None, None if kind else f"salt {n}", None, f"{n}")
                tokens, slots = array("q", shared if kind != 1 else [0, n]), world.allocator.alloc(1).long()
                insert_span(world.tree, None, None, 0, namespace, tokens, len(tokens), slots, raw=False)

    def request(world: Any, prompt: list[int], custom: Any) -> float:
        """It waits for one round, is matched and computed, and finishes; in microseconds."""
        with world.running():
            begin = time.thread_time_ns()
            world.tree.touch_prefix(RadixKey(array("q", prompt), None))
            req = Server(world).admit(prompt, 8, custom)
            assert world.prefill(req)
            world.prefilled(req)
            world.finish(req, array("q", range(8)))
            return (time.thread_time_ns() - begin) / 1000

    for what, custom in (("KeepKV off", OFF), ("compressed", None)):
        best = {(name, n): 1e9 for n in range(len(prompts)) for name in worlds}
        for turn in range(8):  # taking turns, the best of seven: what else runs disturbs all alike
            for name, n in best:
                us = request(worlds[name], prompts[n], custom)
                best[name, n] = min(best[name, n], us if turn else 1e9)  # the first one finds nothing cached
        empty = statistics.median(best["", n] for n in range(len(prompts)))
        for name in [*worlds][1:]:
            ours = statistics.median(best[name, n] for n in range(len(prompts)))
            report.row(f"{what}, {name}", ours, None, empty, IDLE_LIMIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="writes all rows there too")
    out = parser.parse_args().json
    warnings.filterwarnings("ignore")
    try:
        import sglang.srt.mem_cache.radix_cache  # noqa: F401

        have_sglang = True
    except ImportError as error:
        print(f"sglang is not here ({error}): our column only, no rule")
        have_sglang = False
    report = Report(have_sglang)
    for span_tokens in (SPAN_TOKENS, KEY_TOKENS):
        request_table(report, span_tokens)
        report.show()
    for table in (eviction_table, nested_table, depth_table, *([idle_table] if have_sglang else [])):
        table(report)
        report.show()
    print()
    for line in report.broken:
        print(f"broken: {line}")
    passed = not report.broken
    rules = f"rows with * within {LIMIT:g}x of RadixCache; no scan per evicted span; chains; idle namespaces"
    print(f"{'PASS' if passed else 'FAIL'}: {rules}")
    if out is not None:
        about = {
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "load": os.getloadavg()[0],
        }
        out.write_text(json.dumps({**about, "passed": passed, "broken": report.broken, "rows": report.rows}, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
