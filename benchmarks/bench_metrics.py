"""What --enable-metrics costs, against a decode step of a real server.

    python benchmarks/bench_metrics.py [--model PATH]        (make bench-metrics)

The parts are timed alone, in prometheus_client's multiprocess mode, as in a server: medians of many. The decode step is
that of a server of this machine, one request behind 200 tokens: the cheapest that there is, so the share is the most.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields

import torch

from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.observe.metrics import LOOK_EVERY_S, Kinds, Metrics
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.watched import PROMPT, Watched
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.server_process import ServerProcess
from keepkv_sglang.tools.simulate.world import World

LABELS = {"model_name": "m", "engine_type": "unified", "tp_rank": 0, "pp_rank": 0, "moe_ep_rank": 0}
INTERVAL = KeepKVConfig().interval


def seconds_of(work: Callable[[], object], before: Callable[[], object] = lambda: None, times: int = 500) -> float:
    """Median of `work` alone; `before` runs in front of each."""
    spent = []
    for _ in range(times):
        before()
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def parts() -> dict[str, float]:
    """Seconds of each thing that metrics do."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        import prometheus_client  # reads the variable

        kinds = Kinds(prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
        world = World(KeepKVConfig(enabled=True), slots=2000, scale=1, longest=2000, rows=4)
        with world.running():
            return _parts(Metrics(kinds, LABELS), world.rt)


def _parts(metrics: Metrics, rt: Runtime) -> dict[str, float]:
    votes, slots = VoteStore(layers=30, slots=4000, kv_heads=3, device="cpu"), torch.arange(400)

    def not_yet() -> None:
        metrics._next = time.monotonic() + LOOK_EVERY_S

    def count() -> None:
        for field in fields(rt.counters):
            setattr(rt.counters, field.name, getattr(rt.counters, field.name) + 1)
        rt.counters.answers += 2  # one compressed, one whole, one off

    def compress() -> None:
        rt.watched = Watched([(PROMPT, 0.1)], [[1.0] * (len(Watched.bounds) + 1)])

    def update() -> None:
        metrics.update(rt, 0)

    update()
    return {
        "look": seconds_of(lambda: metrics.look(rt, 0), not_yet),
        "update": seconds_of(update, count),
        "compression": seconds_of(update, compress) - seconds_of(update),
        "votes": seconds_of(lambda: votes.spread(slots)),
    }


def decode_step(model: str) -> float:
    """Seconds of one decode step, mean of 300, one request behind 200 tokens."""
    flags = ["--model-path", model, "--enable-keepkv", "--enable-metrics", "--max-total-tokens", "4000"]
    with ServerProcess(flags, env={"KEEPKV_STEP_TIMES": "1"}) as server:
        sampling = {"temperature": 0, "max_new_tokens": 301, "ignore_eos": True}
        status, answer = server.post_json(
            "/generate", {"input_ids": list(range(1000, 1200)), "sampling_params": sampling}
        )
        assert status == 200, answer
        _, info = server.get_json("/server_info")
        steps, seconds, _ = info["internal_states"][0]["step_times"]["decode"]["1"]
    return seconds / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    args = parser.parse_args()
    step = decode_step(args.model)  # before parts(), whose PROMETHEUS_MULTIPROC_DIR would be the server's too
    found = parts()
    often = {  # how many of each in one step
        "look": 2.0,  # before admission, and before the step
        "update": step / LOOK_EVERY_S,
        "compression": 1 / INTERVAL,
        "votes": 1 / INTERVAL,
    }
    rows = [
        (name, f"{1e6 * cost:.1f}", f"{often[name]:.3f}", f"{100 * cost * often[name] / step:.4f} %")
        for name, cost in found.items()
    ]
    whole = sum(cost * often[name] for name, cost in found.items())
    rows.append(("all", f"{1e6 * whole:.1f}", "", f"{100 * whole / step:.4f} %"))
    print(tables.markdown(("part", "microseconds", "in a step", "of a decode step"), rows))
    print(f"\ndecode step: {1e3 * step:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
