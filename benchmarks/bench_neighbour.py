"""What one client costs another: milliseconds per token of a stream beside the worst that a request may ask for.

    python benchmarks/bench_neighbour.py [--tokens 120]

One server with its defaults, 8,000 slots, budget 0.2 where a request names none. The neighbour decodes, KeepKV off;
after 20 tokens the other client's requests come. `stock` rows are the same with "enabled": false: what prefill and
decoding of these tokens cost a neighbour anyway. Between two tokens: the median, the longest; and the sum.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from itertools import pairwise
from typing import Any

import httpx

from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.server_process import ServerProcess

OFF = {"enabled": False}
# (what, tokens, sampling, keepkv settings: each is a row). What the default bounds allow (docs/flags.md): window,
# references and interval as the server's, any budget and n.
CASES: tuple[tuple[str, int, dict[str, Any], tuple[dict[str, Any], ...]], ...] = (
    ("nobody", 0, {}, (OFF,)),
    ("3,000 tokens", 3000, {"max_new_tokens": 8}, (OFF, {})),
    ("6,000 tokens", 6000, {"max_new_tokens": 8}, (OFF, {}, {"budget": 0.9})),
    ("3,000 tokens, 300 of reply", 3000, {"max_new_tokens": 300}, (OFF, {"budget": 1500})),
    ("600 tokens, n = 16, 300 of reply each", 600, {"max_new_tokens": 300, "n": 16}, (OFF, {})),
)


def prompt(tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40000) for _ in range(tokens)]


def request(ids: list[int], sampling: dict[str, Any], keepkv: dict[str, Any]) -> dict[str, Any]:
    custom = {"custom_params": {"keepkv": keepkv}} if keepkv else {}
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "ignore_eos": True, **sampling, **custom}}


def gaps(url: str, tokens: int, other: dict[str, Any] | None, seed: int) -> list[float]:
    """Seconds between the neighbour's tokens from its 20th on; `other` is sent then."""
    stamps: list[float] = []
    beside: threading.Thread | None = None
    ask = request(prompt(200, seed), {"max_new_tokens": tokens}, OFF) | {"stream": True}
    with httpx.stream("POST", f"{url}/generate", json=ask, timeout=600) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            assert "error" not in json.loads(line.removeprefix("data: ")), line
            stamps.append(time.perf_counter())
            if len(stamps) == 20 and other is not None:
                beside = threading.Thread(
                    target=httpx.post, args=(f"{url}/generate",), kwargs={"json": other, "timeout": 600}
                )
                beside.start()
    if beside is not None:
        beside.join()
    return [b - a for a, b in pairwise(stamps[19:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=120, help="that the neighbour decodes")
    args = parser.parse_args()
    flags = [
        "--model-path",
        models.resolve(),
        "--enable-keepkv",
        "--keepkv-budget",
        "0.2",
        "--max-total-tokens",
        "8000",
    ]
    rows, seed = [], 0
    with ServerProcess(flags) as server:
        gaps(server.base_url, 40, None, 999)  # warm
        for name, tokens, sampling, kinds in CASES:
            for kind in kinds:
                seed += 2
                other = request(prompt(tokens, seed + 1), sampling, kind) if tokens else None
                found = sorted(gaps(server.base_url, args.tokens, other, seed))
                label = "" if not tokens else "stock" if kind is OFF else f"KeepKV {kind or ''}"
                rows.append(
                    (name, label, f"{1e3 * found[len(found) // 2]:.0f}", f"{1e3 * found[-1]:.0f}", f"{sum(found):.1f}")
                )
                print(*rows[-1], flush=True)
                httpx.post(f"{server.base_url}/flush_cache", timeout=60)
    columns = ("beside the neighbour", "", "median ms", "longest ms", f"{args.tokens - 20} tokens, s")
    print(f"\ncommit {commit()}\n\n{tables.markdown(columns, rows, text=(0, 1))}")


if __name__ == "__main__":
    main()
