"""What reading a history over its originals costs and saves: seconds to a first token, and a turn's over twenty turns.

    python benchmarks/bench_originals.py [--repeat 3]

One server, 8,000 slots, budget 0.2, native originals, requests one after the other with new random tokens each time:
four minutes on two cores, and as many for each repeat.

First token behind 3,000 tokens and 100 new ones: `computed`, nothing of them is cached; `compressed`, read over what
the cache has of them; `unpacked` and `streamed`, over their originals, which are put into slots or not; `evicted`,
their slots were given to others and only the originals are left.

A conversation of twenty turns, 300 tokens at first and 100 more in each, replies of 16: seconds of each turn.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import httpx

from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.report.statistics import median
from keepkv_sglang.tools.server_process import ServerProcess

SLOTS, HISTORY, NEW = 8000, 3000, 100
COMPRESSED, UNPACKED, STREAMED = {"unpack": False}, {}, {"unpack": 0.001}
MODES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("compressed", COMPRESSED),
    ("unpacked", UNPACKED),
    ("streamed", STREAMED),
)
TURNS, FIRST, REPLY = 20, 300, 16


class Client:
    """Asks a server for tokens behind tokens that it has never seen before."""

    def __init__(self, url: str) -> None:
        self._http, self._random = httpx.Client(base_url=url, timeout=600), random.Random(0)

    def new(self, count: int) -> list[int]:
        return [self._random.randrange(1000, 40000) for _ in range(count)]

    def ask(self, ids: list[int], keepkv: dict[str, Any], tokens: int = 1) -> tuple[float, dict[str, Any]]:
        """(seconds, answer)."""
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens, "custom_params": {"keepkv": keepkv}}
        began = time.perf_counter()
        answer = self._http.post("/generate", json={"input_ids": ids, "sampling_params": sampling})
        seconds = time.perf_counter() - began
        answer.raise_for_status()
        return seconds, answer.json()

    def flush(self) -> None:
        self._http.post("/flush_cache").raise_for_status()


def first_tokens(client: Client) -> dict[str, float]:
    """Seconds to the first token, by how the history is read."""
    found = {}
    history = client.new(HISTORY)
    client.flush()
    found["computed"] = client.ask(history + client.new(NEW), UNPACKED)[0]
    for name, mode in MODES:
        client.flush()
        client.ask(history, mode)
        found[name], answer = client.ask(history + client.new(NEW), mode)
        assert (answer["meta_info"]["keepkv"]["unpacked_tokens"] > 0) == (name != "compressed"), answer["meta_info"]
    client.flush()
    client.ask(history, UNPACKED)
    client.ask(client.new(SLOTS - 300), {"enabled": False})  # takes every slot
    found["evicted"], answer = client.ask(history + client.new(NEW), UNPACKED)
    assert answer["meta_info"]["keepkv"]["unpacked_tokens"] > HISTORY - 200, answer["meta_info"]
    return found


def conversation(client: Client, mode: dict[str, Any]) -> list[float]:
    """Seconds of each turn."""
    client.flush()
    prompt, seconds = client.new(FIRST), []
    for _ in range(TURNS):
        took, answer = client.ask(prompt, mode, REPLY)
        seconds.append(took)
        prompt = prompt + answer["output_ids"] + client.new(NEW)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="of everything; medians are shown")
    args = parser.parse_args()
    flags = (
        *("--model-path", models.resolve(), "--max-total-tokens", str(SLOTS), "--enable-keepkv"),
        *("--keepkv-budget", "0.2", "--keepkv-host-ratio", "3", "--keepkv-unpack", "0.9"),
    )
    with ServerProcess(list(flags)) as server:
        client = Client(server.base_url)
        first_tokens(client)  # what the first requests pay for is not measured
        firsts = [first_tokens(client) for _ in range(args.repeat)]
        talks = {name: [conversation(client, mode) for _ in range(args.repeat)] for name, mode in MODES}
    rows = []
    for name in firsts[0]:
        seconds = median([found[name] for found in firsts])
        times = median([found["computed"] / found[name] for found in firsts])
        rows.append((name, f"{seconds:.2f}", f"{times:.1f}"))
    columns = ("history", "first token, s", "times sooner than computed")
    head = f"{HISTORY} + {NEW} tokens, median of {args.repeat}, commit {commit()}"
    print(f"**{head}**\n\n{tables.markdown(columns, rows)}\n")
    shown = (1, 5, 10, 15, 20)
    rows = []
    for name, talk in talks.items():
        each = [median([seconds[turn] for seconds in talk]) for turn in range(TURNS)]
        rows.append((name, *(f"{each[turn - 1]:.2f}" for turn in shown), f"{sum(each):.1f}"))
    columns = ("history", *(f"turn {turn}, s" for turn in shown), "all 20, s")
    print(f"**Twenty turns of {NEW} tokens and {REPLY} of reply**\n\n{tables.markdown(columns, rows)}")


if __name__ == "__main__":
    main()
