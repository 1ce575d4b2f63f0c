"""What compressing a turn costs beside computing it: the demo model's layers, a turn of --tokens tokens.

    python benchmarks/bench_compression.py [--tokens 2000] [--threads 2] [--budget 0.1] [--repeats 7]
    python benchmarks/bench_compression.py --grow 1500 3000 6000 --budget 0.2 --repeats 3
    python benchmarks/bench_compression.py --grow 7900 --budget 0.9 --window 256 --references 1024 --repeats 1

Prefill is transformers' forward pass of the demo model (SDPA, float32, last logits only): no scheduler, no pool, so it
is a little faster than the server's. Compression is the server's own `compress_rows` over all layers: gather, scores,
select, matching, merging, writing back; with the default number of reference queries and with fewer, in C++ and in
torch. Rounds are interleaved, medians printed. Keys, values and queries are random: the work does not depend on
them.

--grow: CPU seconds of a compression by part and length, its peak memory beyond the K and V of the model, and the power
of n that each grows with from the first length to the last. Also the floor: what scores and nearest keys alone cost,
without merging. The memory is right for the first length only: later ones get memory again that was freed.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from keepkv_sglang.compress import batch, layer, select
from keepkv_sglang.compress.batch import SCRATCH_BYTES, Rows, Storage, compress_rows
from keepkv_sglang.compress.rules import base, ridge
from keepkv_sglang.kernels import choose
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.peak_memory import peak_memory
from keepkv_sglang.tools.report import tables

REFERENCES = (256, 128, 64, 0)


def compression(lm: Any, tokens: int, config: KeepKVConfig) -> Callable[[], None]:
    """One call compresses `tokens` tokens of every layer of `lm`, a model's configuration, to their budget, beside
    them."""
    torch.manual_seed(0)
    layers, heads, q_heads = lm.num_hidden_layers, lm.num_key_value_heads, lm.num_attention_heads
    dim, keep, references = lm.hidden_size // q_heads, -int(-tokens * config.budget // 1), config.references
    slots = tokens + keep
    keys, values = ([torch.randn(slots, heads, dim) for _ in range(layers)] for _ in range(2))
    storage = Storage(keys, values, [torch.zeros(slots, heads) for _ in range(layers)], [dim**-0.5] * layers)
    rows = Rows(torch.arange(0), torch.arange(tokens), torch.arange(tokens, slots))
    queries = [torch.randn(references + config.window, q_heads, dim) * 2 for _ in range(layers)]
    index = torch.cat([torch.arange(tokens, tokens + references), torch.arange(tokens - config.window, tokens)])
    policy = span_policy(config, keep, sinks=config.sinks)

    def call() -> None:
        for _ in compress_rows(storage, rows, queries.__getitem__, q_heads, index, policy, SCRATCH_BYTES):
            pass

    return call


def in_torch(call: Callable[[], None]) -> Callable[[], None]:
    def slow() -> None:
        os.environ["KEEPKV_CPU_KERNEL"] = "torch"
        try:
            call()
        finally:
            del os.environ["KEEPKV_CPU_KERNEL"]

    return slow


class Clock:
    """CPU seconds of all threads by part of a compression; a part's time leaves out what it calls of other parts."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - begin
                self.seconds[part] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return call

    def watch(self, owner: Any, name: str, part: str) -> None:
        """owner.name, a function, method or static method, counts for `part` from now on."""
        found = vars(owner)[name]
        call = self.timed(part, getattr(found, "__func__", found))
        setattr(owner, name, staticmethod(call) if isinstance(found, staticmethod) else call)

    def watch_named(self, owner: Any, name: str, part: str) -> None:
        """The same of what owner.name returns."""
        get = vars(owner)[name]
        setattr(owner, name, lambda policy: self.timed(part, get(policy)))

    def watch_all(self) -> None:
        self.watch(batch, "_gather", "gather")
        self.watch(layer.HeadView, "of", "gather")
        self.watch(layer, "query_sums", "sums over the queries")
        self.watch(layer.HeadView, "window", "sums over the queries")
        self.watch_named(layer, "get_scorer", "selection")
        self.watch(layer, "select", "selection")
        self.watch(layer, "match", "selection")
        self.watch(select, "nearest_kept", "nearest kept key")
        self.watch(base, "merge_segments", "means of clusters")
        self.watch(layer.Segments, "from_assignment", "means of clusters")
        self.watch_named(layer, "get_rule", "fit: votes, attention")
        self.watch(ridge, "_gram", "fit: gram")
        self.watch(ridge, "solve_gram", "fit: factorisation")
        kernel = choose.implementation("merge", torch.zeros(1))
        if kernel is not None and hasattr(kernel, "fit"):
            self.watch(kernel, "fit", "fit: votes, attention and gram in C++")
        self.watch(layer, "_merge_heads", "writing back")
        self.watch(batch, "compress_layer", "rest")


def grow(lm: Any, config: KeepKVConfig, lengths: list[int], repeats: int) -> None:
    clock = Clock()
    clock.watch_all()
    found: list[dict[str, float]] = []
    for tokens in lengths:
        call, rounds = compression(lm, tokens, config), []
        for repeat in range(repeats + (repeats > 1)):
            clock.seconds.clear()
            begin, wall = time.process_time(), time.perf_counter()
            with peak_memory() as peak:
                call()
            if repeat or repeats == 1:
                whole = time.process_time() - begin
                rest = {"writing back": clock.seconds["writing back"] + whole - clock.seconds.total()}
                rounds.append({**clock.seconds, **rest, "all": whole, "wall": time.perf_counter() - wall})
                rounds[-1]["peak memory, GB"] = peak.bytes / 1e9
        found.append({part: statistics.median(r.get(part, 0.0) for r in rounds) for part in rounds[0]})
        found[-1]["fit, all of it"] = sum(x for part, x in found[-1].items() if part.startswith("fit: "))
        floor = ("gather", "sums over the queries", "selection", "nearest kept key")
        found[-1]["of these scores and matching"] = sum(found[-1].get(part, 0.0) for part in floor)
    lines = []
    for part in dict.fromkeys(part for row in found for part in row):
        row = [x.get(part, 0.0) for x in found]
        power = math.nan if min(row[0], row[-1]) < 0.01 or len(row) < 2 else math.log(row[-1] / row[0])
        if len(row) > 1:
            power /= math.log(lengths[-1] / lengths[0])
        lines.append((part, *(f"{x:.3f}" for x in row), f"{power:.2f}"))
    print(tables.plain(("CPU seconds, tokens", *map(str, lengths), "grows as n^"), lines))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--grow", type=int, nargs="+", metavar="TOKENS", help="by part, at these lengths")
    parser.add_argument("--model", help="as `keepkv model` takes it (default: the demo model)")
    parser.add_argument("--layers", type=int, help="with --grow: so many of the model's")
    parser.add_argument("--window", type=int, default=KeepKVConfig.window)
    parser.add_argument("--references", type=int, default=REFERENCES[0], help="with --grow")
    parser.add_argument("--merge", default=KeepKVConfig.merge)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = KeepKVConfig(enabled=True, budget=args.budget, window=args.window, merge=args.merge)
    if args.grow:
        config = replace(config, references=args.references)
        print(f"torch {torch.__version__}, commit {commit()}, {args.threads} threads")
        print(f"budget {args.budget}, window {args.window}, {args.references} references, {args.merge}")
        shape = AutoConfig.from_pretrained(models.resolve(args.model))
        shape.num_hidden_layers = args.layers or shape.num_hidden_layers
        return grow(shape, config, args.grow, args.repeats)
    lm = AutoModelForCausalLM.from_pretrained(models.resolve(args.model), dtype=torch.float32).eval()
    ids = torch.randint(1000, 40_000, (1, args.tokens))

    def prefill() -> None:
        with torch.inference_mode():
            lm(ids, logits_to_keep=1, use_cache=True)

    calls: dict[str, Callable[[], None]] = {"prefill": prefill}
    for references in REFERENCES:
        call = compression(lm.config, args.tokens, replace(config, references=references))
        calls[f"{references} references"] = call
        if references in REFERENCES[:1]:
            calls[f"{references} references, torch"] = in_torch(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(args.repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    print(f"torch {torch.__version__}, commit {commit()}, {args.threads} threads, {args.tokens} tokens")
    medians = {name: statistics.median(found) for name, found in times.items()}
    base = medians.pop("prefill")
    compressions = [(f"compress, {name}", f"{s * 1e3:.0f}", f"{s / base:.1%}") for name, s in medians.items()]
    print(tables.plain(("", "ms", "of prefill"), [("prefill", f"{base * 1e3:.0f}", ""), *compressions]))


if __name__ == "__main__":
    main()
