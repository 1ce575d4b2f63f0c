"""What one client costs another: a stranger does the worst that a request may ask for, and a neighbour waits.

    make bench-stranger ARGS="[--tokens N] [--only REGEX] [--same-server] [--flags FLAGS]"

Two servers run at the same time and take turns: --enable-keepkv at its defaults, and our attention backend without it
(`off`). The stranger sends the same tokens to both, its keepkv settings only to the first. The neighbour decodes one
stream, KeepKV off for it, and meanwhile somebody asks for a first token every half second. Of each load: the median
gap between two tokens of the stream; what the scheduler computed in a gap (all cores, interquartile mean, since the
kernel counts in 10 ms: the better number on a machine that others use too); the longest gap; the median time to a first
token. A prompt that is longer than KeepKV's pool fits the larger pool of the other server.
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
import psutil
from scipy.stats import trim_mean

from keepkv_sglang.tools.bench.servers import Setup, warm_up
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.report.statistics import median
from keepkv_sglang.tools.server_process import ServerProcess, group_members

POOLS = {"off": 16_000, "keepkv": 5_200}
NAMES = {"off": "disabled", "keepkv": "keepkv"}  # as Setup calls them
NEIGHBOUR = 1500  # tokens of its stream. SGLang sets them all aside (ignore_eos): a longer one keeps the stranger out
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
    return Load(f"{tokens:,} tokens{name}", lambda seed: [body(prompt(tokens, seed), new, keepkv, n)])


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


def loads(tokens: int) -> list[Load]:
    """tokens: of a long prompt that fits KeepKV's pool."""
    wide = tokens // 64
    ranges = ",".join(f"{wide * i}-{wide * i + wide // 2}" for i in range(64))
    return [
        Load("nobody", lambda seed: []),
        one("", tokens, 8),
        one(", 140 of reply", tokens, 140),
        one(", budget 0.9", tokens, 8, {"budget": 0.9}),
        one(", budget 2 slots", tokens, 8, {"budget": 2}),
        one(", protect: 64 ranges", tokens, 8, {"protect": ranges}),
        one(", fair: 64 ranges", tokens, 8, {"fair": ranges}),
        one(", recent and sinks of a million", tokens, 8, {"recent": 1 << 20, "sinks": 1 << 20}),
        one(", chunk 128, threshold -1", tokens, 8, {"chunk": 128, "threshold": -1}),
        one(", scorer keepkv, merge zip", tokens, 8, {"scorer": "keepkv", "merge": "zip"}),
        one(", merge least_squares", tokens, 8, {"merge": "least_squares"}),
        one(", longer than KeepKV's pool", POOLS["keepkv"] + 400, 8),
        one(", n = 32, 132 of reply each", 100, 132, n=32),
        Load("a chain of 25 turns of 80 tokens", chain),
        Load("60 prompts that begin alike", alike, 8),
        Load("300 salts", salted, 8),
        Load("60 configurations", settings, 8),
    ]


def scheduler_of(server: ServerProcess) -> psutil.Process:
    processes = map(psutil.Process, group_members(server.process.pid))
    return next(process for process in processes if "sglang::scheduler" in " ".join(process.cmdline()))


class Neighbour:
    """A stream that decodes until it is closed. stamps: when each of its tokens came; spent: the seconds that the
    scheduler had computed until then."""

    def __init__(self, server: ServerProcess, keepkv: dict[str, Any] | None, seed: int) -> None:
        self.stamps: list[float] = []
        self.spent: list[float] = []
        self._scheduler = scheduler_of(server)
        self._ask = body(prompt(200, seed), NEIGHBOUR, keepkv, stream=True)
        self._url, self._stop, self.started = server.base_url, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        with httpx.stream("POST", f"{self._url}/generate", json=self._ask, timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times = self._scheduler.cpu_times()
                    self.spent.append(times.user + times.system)
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


def measure(server: ServerProcess, load: Load, seed: int, is_on: bool, own: dict[str, Any] | None) -> dict[str, float]:
    """Milliseconds. own: settings of whoever is not compressed: the neighbour, and the stranger where it is off. The
    stranger stops after MOST_S with what it has begun."""
    url = server.base_url
    # The last neighbour's row may still be given back.
    httpx.post(f"{url}/flush_cache", params={"timeout": 60}, timeout=90).raise_for_status()
    requests, done = load.requests(seed), threading.Event()
    with Neighbour(server, own, seed + 900_000) as neighbour, ThreadPoolExecutor(load.at_once + 1) as pool:
        probes = pool.submit(first_tokens, url, own, seed + 950_000, done)
        began = time.perf_counter()

        def send(request: dict[str, Any]) -> None:
            if time.perf_counter() - began < MOST_S:
                if not is_on:
                    request["sampling_params"]["custom_params"] = own and {"keepkv": own}
                httpx.post(f"{url}/generate", json=request, timeout=600).raise_for_status()

        list(pool.map(send, requests))
        busy = time.perf_counter() - began
        time.sleep(max(0.0, LEAST_S - busy))
        ended = time.perf_counter()
        done.set()
        firsts = probes.result()
    pairs = [i for i, (a, b) in enumerate(pairwise(neighbour.stamps)) if b > began and a < ended]
    gaps, spent = ([list_[i + 1] - list_[i] for i in pairs] for list_ in (neighbour.stamps, neighbour.spent))
    values = {"gap": median(gaps), "cpu": trim_mean(spent, 0.25), "longest": max(gaps), "first": median(firsts)}
    return {**{name: 1000 * value for name, value in values.items()}, "busy": busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="loads whose name matches this regular expression")
    parser.add_argument("--tokens", type=int, default=3000, help="of a long prompt")
    parser.add_argument("--same-server", action="store_true", help="off: its requests with KeepKV off")
    parser.add_argument("--flags", default="", help="further flags of the server with KeepKV")
    args = parser.parse_args()
    rows, worst = [], (0.0, "")
    with ExitStack() as stack:
        setup = Setup(models.resolve(), "0.2", keepkv_flags=tuple(shlex.split(args.flags)))
        started = ["keepkv"] if args.same_server else list(POOLS)
        servers = {name: stack.enter_context(setup.start(NAMES[name], POOLS[name])) for name in started}
        for server in servers.values():
            warm_up(server)
        stock = servers.setdefault("off", servers["keepkv"])
        for index, load in enumerate(load for load in loads(args.tokens) if re.search(args.only, load.name)):
            found: dict[str, dict[str, float]] = {}
            for name in sorted(servers, reverse=index % 2 == 1):
                own = None if servers[name] is stock and not args.same_server else OFF
                found[name] = measure(servers[name], load, 10_000 * index, name == "keepkv", own)
            off, on = found["off"], found["keepkv"]
            row = [load.name, f"{off['busy']:.1f}", f"{on['busy']:.1f}"]
            for key in ("gap", "cpu", "longest", "first"):
                row += [f"{off[key]:.0f}", f"{on[key]:.0f}"]
            rows.append(row)
            print(*row, sep=" | ", flush=True)
            if load.single:
                worst = max(worst, (on["cpu"] / off["cpu"], load.name))
    columns = ["what the stranger sends", "s", "", "gap, ms", "", "computed", "", "longest", "", "first token", ""]
    print(f"\ncommit {commit()}; each column: off, then KeepKV\n\n{tables.markdown(columns, rows)}")
    print(f"\nworst single request, computed per gap: {worst[0]:.2f} of what it does with KeepKV off ({worst[1]})")


if __name__ == "__main__":
    main()
