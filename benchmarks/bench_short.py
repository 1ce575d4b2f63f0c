"""What KeepKV costs requests that it never compresses: prompts below --keepkv-min-tokens, an ample pool.

    python benchmarks/bench_short.py [--starts 4] [--pairs 10] [--requests 32] [--json FILE]        (make bench-short)

Two servers run at the same time, our attention backend with and without --enable-keepkv, and take turns: the same batch
of requests to one, then to the other, the order changing with every pair. An idle server sleeps. So what the machine
does meanwhile hits both, and batches of a few seconds can be compared to a per cent, which runs minutes apart
(`keepkv bench agents --workload short`) cannot. Two processes of the same program differ by some per cent from the
start, so the servers are started --starts times. Printed: each start's median of the paired ratios of wall clock, the
median of all with a 90 % interval (bootstrap over starts, then pairs), and whether all outputs were the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from keepkv_sglang.tools.bench.servers import Setup, flush, warm_up
from keepkv_sglang.tools.bench.workloads import AllAtOnce
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report.statistics import median_interval

POOL = 40_000


def one_start(setup: Setup, load: AllAtOnce, pairs: int, seed: int) -> tuple[list[float], bool]:
    """Paired ratios of wall clock, keepkv over disabled, and whether the outputs were the same."""
    ratios, same = [], True
    with ExitStack() as running:
        servers = {name: running.enter_context(setup.start(name, POOL)) for name in ("disabled", "keepkv")}
        for server in servers.values():
            warm_up(server)
        for pair in range(pairs):
            seconds, outputs = {}, {}
            for name in sorted(servers, reverse=pair % 2 == 1):
                flush(servers[name])
                began = time.perf_counter()
                calls = replace(load, seed=seed + pair).run(servers[name].port, lambda: None)
                seconds[name] = time.perf_counter() - began
                assert all(call.ok for call in calls), [call.error for call in calls]
                outputs[name] = [call.output for call in calls]
            ratios.append(seconds["keepkv"] / seconds["disabled"])
            same &= outputs["keepkv"] == outputs["disabled"]
            print(f"  disabled {seconds['disabled']:.2f} s, keepkv {ratios[-1]:.3f} of it", flush=True)
    return ratios, same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    setup = Setup(str(models.prepare()), "0.1")
    load = AllAtOnce(options.requests, prompt=40, new_tokens=20)
    starts, same = [], True
    for start in range(options.starts):
        ratios, equal = one_start(setup, load, options.pairs, start * options.pairs)
        starts.append(ratios)
        same &= equal
        print(f"start {start + 1}: median {statistics.median(ratios):.3f}", flush=True)
    every = [ratio for ratios in starts for ratio in ratios]
    low, high = median_interval(starts, 0.9)
    sizes = f"{options.starts} x {options.pairs} pairs of {options.requests} requests, 40 + 20 tokens"
    print(f"commit {commit()}, {sizes}")
    print(f"keepkv takes {statistics.median(every):.3f} of disabled's time, 90 % interval {low:.3f} to {high:.3f}")
    print(f"outputs: {'all the same' if same else 'NOT the same'}")
    if options.json:
        options.json.write_text(json.dumps({"starts": starts, "median": statistics.median(every), "same": same}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
