"""Stock SGLang (torch_native) against KeepKV at budget 1: what the attention kernel alone gives on a CPU.

    python benchmarks/bench_budget1.py [--model PATH] [--json FILE]        (make bench-budget1)

Two servers, one after the other on the same machine, the same requests: a cold prefill, a short extend of a long cached
prefix (the agent's turn), and decoding. Nothing is compressed, so outputs are compared token for token. Seconds are
medians of three; only the ratios mean something on a noisy machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.server_process import ServerProcess


def prompt(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40000) for _ in range(count)]


def timed(server: ServerProcess, ids: list[int], new: int) -> tuple[float, list[int]]:
    """Seconds and output tokens of one greedy request."""
    sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    start = time.perf_counter()
    status, answer = server.post_json("/generate", {"input_ids": ids, "sampling_params": sampling})
    assert status == 200, answer
    return time.perf_counter() - start, answer["output_ids"]


def measure(server: ServerProcess) -> tuple[dict[str, float], list[list[int]]]:
    """Median seconds per case, and every output."""
    seconds: dict[str, list[float]] = {}
    outputs = []
    for round_ in range(3):
        base = prompt(2000, 10 + round_)
        cases = {
            "prefill 2000 + 1": (base, 1),
            "extend 2000 cached + 16 new + 1": (base + prompt(16, 20 + round_), 1),
            "decode 64 after 2000 cached": (base + prompt(16, 20 + round_) + [5], 64),
            "decode 64 after 200": (prompt(200, 30 + round_), 64),
        }
        for name, (ids, new) in cases.items():
            spent, output = timed(server, ids, new)
            seconds.setdefault(name, []).append(spent)
            outputs.append(output)
    return {name: statistics.median(values) for name, values in seconds.items()}, outputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flags = ["--model-path", options.model, "--max-total-tokens", "12000"]
    results, outputs = {}, []
    for name, extra in (("stock", []), ("keepkv", ["--enable-keepkv", "--keepkv-budget", "1"])):
        print(f"starting {name} ...", file=sys.stderr, flush=True)
        with ServerProcess(flags + extra, say=lambda line: print("  " + line, file=sys.stderr)) as server:
            timed(server, prompt(64, 1), 8)
            results[name], produced = measure(server)
            outputs.append(produced)
    pairs = [(case, stock, results["keepkv"][case]) for case, stock in results["stock"].items()]
    rows = [(case, f"{stock:.2f}", f"{ours:.2f}", f"{stock / ours:.2f}") for case, stock, ours in pairs]
    print(tables.plain(("case", "stock s", "budget 1 s", "ratio"), rows))
    print("outputs equal:", outputs[0] == outputs[1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0 if outputs[0] == outputs[1] else 1


if __name__ == "__main__":
    sys.exit(main())
