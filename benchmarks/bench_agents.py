"""Six agents in a pool that holds a third of their contexts: stock SGLang, then KeepKV, one after the other.

    python benchmarks/bench_agents.py [--pool 3000] [--budget 0.1] [--json FILE]        (make bench-agents)

Stock is the plain CPU platform with SGLang's torch_native attention and its radix cache on. The third server is ours at
budget 1: what the attention kernel gives without compression. Seconds mean something only side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from keepkv_sglang.agent_load import AgentLoad, run_agents
from keepkv_sglang.server_process import ServerProcess


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--pool", type=int, default=3000, help="KV slots")
    parser.add_argument("--budget", default="0.1")
    parser.add_argument("--agents", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", choices=["stock", "keepkv", "budget1"], action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = AgentLoad(agents=options.agents, turns=options.turns)
    servers = {
        "stock": [],
        "keepkv": ["--enable-keepkv", "--keepkv-budget", options.budget],
        "budget1": ["--enable-keepkv", "--keepkv-budget", "1"],
    }
    print(f"{load.agents} agents, {load.turns} turns, contexts of {load.context} tokens, pool {options.pool} slots")
    print(f"{'server':9}{'hit rate':>9}{'compressed':>11}{'turns/s':>9}{'seconds':>9}{'retracted':>10}{'errors':>7}")
    results = {}
    for name in options.only or servers:
        flags = ["--model-path", options.model, "--max-total-tokens", str(options.pool), *servers[name]]
        with ServerProcess([*flags, "--enable-metrics"], timeout_s=300) as server:
            run_agents(server, AgentLoad(agents=1, turns=1, system=40, task=40, seed=99))  # warm up
            server.post_json("/flush_cache", {})
            report = run_agents(server, load)
            retracted = retractions(server)
        share = report.cached_compressed_tokens / max(report.cached_tokens, 1)
        print(
            f"{name:9}{report.hit_rate:9.3f}{share:11.3f}{report.turns_per_second:9.3f}{report.seconds:9.1f}"
            f"{retracted:10.0f}{len(report.errors) + report.short_answers:7}",
            flush=True,
        )
        results[name] = {**asdict(report), "hit_rate": report.hit_rate, "retracted": retracted}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 1 if any(result["errors"] or result["short_answers"] for result in results.values()) else 0


def retractions(server: ServerProcess) -> float:
    """Requests that SGLang put back for want of memory, from its metrics."""
    lines = str(server.get_json("/metrics")[1]).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sglang:num_retracted_requests_total"))


if __name__ == "__main__":
    sys.exit(main())
