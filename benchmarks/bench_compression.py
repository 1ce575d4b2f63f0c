"""What compressing a turn costs beside computing it: the demo model's layers, a turn of --tokens tokens.

    python benchmarks/bench_compression.py [--tokens 2000] [--threads 2] [--budget 0.1] [--repeats 7]

Prefill is transformers' forward pass of the demo model (SDPA, float32, last logits only): no scheduler, no pool, so it
is a little faster than the server's. Compression is the server's own `compress_rows` over all layers: gather, scores,
selection, matching, merging, writing back; with the default number of reference queries and with fewer, in C++ and in
torch. Rounds are interleaved, medians printed. Keys, values and queries are random: the work does not depend on
them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from keepkv_sglang import model
from keepkv_sglang.compressor import SCRATCH_BYTES
from keepkv_sglang.config import KeepKVConfig
from keepkv_sglang.layer_batch import Rows, Storage, compress_rows
from keepkv_sglang.origin import commit
from keepkv_sglang.span_policy import span_policy

REFERENCES = (256, 128, 64, 0)


def compression(config, tokens: int, budget: float, references: int) -> Callable[[], None]:
    """One call compresses `tokens` tokens of every layer to their budget, beside them."""
    torch.manual_seed(0)
    layers, heads, q_heads = config.num_hidden_layers, config.num_key_value_heads, config.num_attention_heads
    dim, keep = config.hidden_size // q_heads, -int(-tokens * budget // 1)
    ours = KeepKVConfig(enabled=True, budget=budget, references=references)
    slots = tokens + keep
    keys, values = ([torch.randn(slots, heads, dim) for _ in range(layers)] for _ in range(2))
    storage = Storage(keys, values, [torch.zeros(slots, heads) for _ in range(layers)], [dim**-0.5] * layers)
    rows = Rows(torch.arange(0), torch.arange(tokens), torch.arange(tokens, slots))
    queries = [torch.randn(references + ours.window, q_heads, dim) * 2 for _ in range(layers)]
    index = torch.cat([torch.arange(tokens, tokens + references), torch.arange(tokens - ours.window, tokens)])
    policy = span_policy(ours, keep, sinks=ours.sinks)

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


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = AutoModelForCausalLM.from_pretrained(model.prepare(), dtype=torch.float32).eval()
    ids = torch.randint(1000, 40_000, (1, args.tokens))

    def prefill() -> None:
        with torch.inference_mode():
            lm(ids, logits_to_keep=1, use_cache=True)

    calls: dict[str, Callable[[], None]] = {"prefill": prefill}
    for references in REFERENCES:
        call = compression(lm.config, args.tokens, args.budget, references)
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
    base = statistics.median(times["prefill"])
    print(f"{'prefill':28}{base * 1e3:9.0f} ms")
    for name, found in times.items():
        if name != "prefill":
            median = statistics.median(found)
            print(f"{'compress, ' + name:28}{median * 1e3:9.0f} ms {median / base:8.1%}")


if __name__ == "__main__":
    main()
