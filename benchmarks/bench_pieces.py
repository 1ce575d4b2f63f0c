"""How long a stream stops while somebody else's long prompt is compressed: at once, and in pieces.

    python -m benchmarks.bench_pieces [--tokens N] [--pieces P ...] [--repeat R]        (make bench-pieces)

One server per --keepkv-piece-tokens, one after the other. A neighbour decodes a stream, KeepKV off for it; a stranger's
prompt comes, with a reply of 150 tokens. The stop: the neighbour's longest gap between two tokens, in which the last
chunk of the prompt is computed, and compressed where that happens at once. Later: gaps behind the stranger's first
token, in which the pieces are.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise

import httpx

from benchmarks.bench_stranger import OFF, Neighbour, body, prompt
from keepkv_sglang.tools.bench.servers import Setup, warm_up
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.report.statistics import median
from keepkv_sglang.tools.server_process import ServerProcess

REPLY = 150


def gaps(server: ServerProcess, tokens: int, seed: int) -> tuple[float, list[float], float]:
    """Seconds: (the stop, the neighbour's gaps behind the stranger's first token, until that token)."""
    httpx.post(f"{server.base_url}/flush_cache", params={"timeout": 60}, timeout=90).raise_for_status()
    ask = body(prompt(tokens, seed), REPLY, stream=True)
    with Neighbour(server, OFF, seed + 900_000) as neighbour:
        began, first = time.perf_counter(), 0.0
        with httpx.stream("POST", f"{server.base_url}/generate", json=ask, timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter()
                    meta = json.loads(line[6:])["meta_info"]
        ended = time.perf_counter()
        assert meta["keepkv"]["compressions"] >= 1, meta["keepkv"]
    found = [(a, b - a) for a, b in pairwise(neighbour.stamps) if b > began and a < ended]
    return max(gap for _, gap in found), [gap for a, gap in found if a >= first], first - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7500, help="of the stranger's prompt")
    parser.add_argument("--pieces", type=int, nargs="+", default=[0, 1024, 256], help="values of --keepkv-piece-tokens")
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for piece in args.pieces:
        setup = Setup(models.resolve(), "0.2", keepkv_flags=("--keepkv-piece-tokens", str(piece)))
        with setup.start("keepkv", args.tokens + 2500) as server:
            warm_up(server)
            for repeat in range(args.repeat):
                stop, found, first = gaps(server, args.tokens, 1000 * repeat + piece)
                usual, worst = median(found), max(found)
                later = [f"{1000 * usual:.0f}", f"{1000 * worst:.0f}", f"{worst / usual:.2f}"]
                row = [piece, f"{first:.1f}", f"{stop:.1f}", *later]
                rows.append(row)
                print(*row, sep=" | ", flush=True)
    columns = ["piece tokens", "stranger's first token, s", "stop, s", "later: median, ms", "worst, ms", "ratio"]
    print(f"\n{args.tokens} tokens, commit {commit()}\n\n{tables.markdown(columns, rows)}")


if __name__ == "__main__":
    main()
