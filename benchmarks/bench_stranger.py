"""What one client costs another: a stranger does the worst that a request may ask for, and a neighbour waits.

    python benchmarks/bench_stranger.py [--only REGEX] [--flags FLAGS]        (make bench-stranger, under 8 minutes)

Two servers run at the same time and take turns: --enable-keepkv at its defaults, and our attention backend without it
(`off`). The stranger sends the same tokens to both, its keepkv settings only to the first. The neighbour decodes one
stream, KeepKV off for it, and meanwhile somebody asks for a first token every half second. Of each load: the median
and the longest gap between two tokens of the stream, and the median time to a first token. A prompt that is longer
than KeepKV's pool fits the larger pool of the other server.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

from keepkv_sglang.tools.bench.servers import Setup, warm_up
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.report.statistics import median

POOLS = {"off": 16_000, "keepkv": 5_200}
NAMES = {"off": "disabled", "keepkv": "keepkv"}  # as Setup calls them
LEAST_S, MOST_S = 3.0, 8.0  # how long the neighbour is watched
PROBE_S = 0.5
OFF = {"enabled": False}


def prompt(tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40000) for _ in range(tokens)]


def body(ids: list[int], new: int, keepkv: dict[str, Any] | None = None, n: int = 1, **more: Any) -> dict[str, Any]:
    custom = {"custom_params": {"keepkv": keepkv}} if keepkv else {}
    return {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "ignore_eos": True, "max_new_tokens": new, "n": n, **custom},
        **more,
    }


@dataclass(frozen=True)
class Load:
    """requests(seed): what the stranger sends, `at_once` at a time. single: one request (n counts as one)."""

    name: str
    requests: Callable[[int], list[dict[str, Any]]]
    at_once: int = 1

    @property
    def single(self) -> bool:
        return self.at_once == 1 and len(self.requests(0)) == 1


def one(name: str, tokens: int, new: int, keepkv: dict[str, Any] | None = None, n: int = 1) -> Load:
    return Load(name, lambda seed: [body(prompt(tokens, seed), new, keepkv, n)])


def chain(seed: int) -> list[dict[str, Any]]:
    text = prompt(25 * 80, seed)
    return [body(text[: 80 * turn], 1) for turn in range(1, 26)]


def alike(seed: int) -> list[dict[str, Any]]:
    begin = prompt(100, seed)
    return [body(begin + prompt(70, seed + 1 + index), 1) for index in range(60)]


def salted(seed: int) -> list[dict[str, Any]]:
    return [body(prompt(20, seed + index), 1, cache_salt=f"{seed} {index}") for index in range(300)]


def settings(seed: int) -> list[dict[str, Any]]:
    return [body(prompt(100, seed + index), 1, {"budget": 0.2 + index / 100}) for index in range(60)]


RANGES = ",".join(f"{40 * i}-{40 * i + 20}" for i in range(64))
LOADS = (
    Load("nobody", lambda seed: []),
    one("2,000 tokens", 2000, 8),
    one("2,000 tokens, 140 of reply", 2000, 140),
    one("2,000 tokens, budget 0.9", 2000, 8, {"budget": 0.9}),
    one("2,000 tokens, budget 2 slots", 2000, 8, {"budget": 2}),
    one("2,000 tokens, protect: 64 ranges", 2000, 8, {"protect": RANGES}),
    one("2,000 tokens, fair: 64 ranges", 2000, 8, {"fair": RANGES}),
    one("2,000 tokens, recent and sinks of a million", 2000, 8, {"recent": 1 << 20, "sinks": 1 << 20}),
    one("2,000 tokens, chunk 128, threshold -1", 2000, 8, {"chunk": 128, "threshold": -1}),
    one("2,000 tokens, scorer keepkv, merge zip", 2000, 8, {"scorer": "keepkv", "merge": "zip"}),
    one("2,000 tokens, merge least_squares", 2000, 8, {"merge": "least_squares"}),
    one("5,600 tokens, longer than KeepKV's pool", 5600, 8),
    one("100 tokens, n = 32, 132 of reply each", 100, 132, n=32),
    Load("a chain of 25 turns of 80 tokens", chain),
    Load("60 prompts that begin alike", alike, 8),
    Load("300 salts", salted, 8),
    Load("60 configurations", settings, 8),
)


class Neighbour:
    """A stream that decodes until it is closed: when each of its tokens came."""

    def __init__(self, url: str, keepkv: dict[str, Any] | None, seed: int) -> None:
        self.stamps: list[float] = []
        self._ask = body(prompt(200, seed), 2000, keepkv, stream=True)
        self._url, self._stop, self.started = url, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        with httpx.stream("POST", f"{self._url}/generate", json=self._ask, timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.stamps.append(time.perf_counter())
                if len(self.stamps) == 15:
                    self.started.set()
                if self._stop.is_set():
                    return

    def __enter__(self) -> Neighbour:
        self._thread.start()
        assert self.started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def first_tokens(url: str, keepkv: dict[str, Any] | None, seed: int, done: threading.Event) -> list[float]:
    """Seconds to a first token, asked for every PROBE_S until done; the last one may end later."""
    found: list[float] = []
    while not done.wait(PROBE_S if found else 0.1):
        seed += 1
        began = time.perf_counter()
        httpx.post(f"{url}/generate", json=body(prompt(30, seed), 1, keepkv), timeout=600).raise_for_status()
        found.append(time.perf_counter() - began)
    return found


def measure(server: Any, load: Load, seed: int, is_on: bool) -> dict[str, float]:
    """Milliseconds. The stranger stops after MOST_S with what it has begun."""
    url, own = server.base_url, OFF if is_on else None
    # The last neighbour's row may still be given back.
    httpx.post(f"{url}/flush_cache", params={"timeout": 60}, timeout=90).raise_for_status()
    requests, done = load.requests(seed), threading.Event()
    with Neighbour(url, own, seed + 900_000) as neighbour, ThreadPoolExecutor(load.at_once + 1) as pool:
        probes = pool.submit(first_tokens, url, own, seed + 950_000, done)
        began = time.perf_counter()

        def send(request: dict[str, Any]) -> None:
            if time.perf_counter() - began < MOST_S:
                if not is_on:
                    request["sampling_params"].pop("custom_params", None)
                httpx.post(f"{url}/generate", json=request, timeout=600).raise_for_status()

        list(pool.map(send, requests))
        busy = time.perf_counter() - began
        time.sleep(max(0.0, LEAST_S - busy))
        ended = time.perf_counter()
        done.set()
        firsts = probes.result()
    gaps = [b - a for a, b in pairwise(neighbour.stamps) if b > began and a < ended]
    values = {"gap": median(gaps), "longest": max(gaps), "first": median(firsts), "slowest": max(firsts)}
    return {**{name: 1000 * value for name, value in values.items()}, "busy": busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="loads whose name matches this regular expression")
    parser.add_argument("--flags", default="", help="further flags of the server with KeepKV")
    args = parser.parse_args()
    rows, worst = [], (0.0, "")
    with ExitStack() as stack:
        setup = Setup(models.resolve(), "0.2", keepkv_flags=tuple(shlex.split(args.flags)))
        servers = {name: stack.enter_context(setup.start(NAMES[name], pool)) for name, pool in POOLS.items()}
        for server in servers.values():
            warm_up(server)
        for index, load in enumerate(load for load in LOADS if re.search(args.only, load.name)):
            found: dict[str, dict[str, float]] = {}
            for name in sorted(servers, reverse=index % 2 == 1):
                found[name] = measure(servers[name], load, 10_000 * index, name == "keepkv")
            off, on = found["off"], found["keepkv"]
            row = [load.name, f"{off['busy']:.1f}", f"{on['busy']:.1f}"]
            for key in ("gap", "longest", "first", "slowest"):
                row += [f"{off[key]:.0f}", f"{on[key]:.0f}"]
            rows.append(row)
            print(*row, sep=" | ", flush=True)
            if load.single:
                worst = max(worst, (on["gap"] / off["gap"], load.name))
    columns = ["what the stranger sends", "s", "s", "gap, ms", "", "longest", "", "first token", "", "slowest", ""]
    print(f"\ncommit {commit()}; each column: off, then KeepKV\n\n{tables.markdown(columns, rows)}")
    print(f"\nworst single request: {worst[0]:.2f} of what it does with KeepKV off ({worst[1]})")


if __name__ == "__main__":
    main()
