"""`serving`: SGLang's own bench_serving as the client, with the sizes of `decode`. A second opinion on our client.

It measures what it knows: rates, TTFT, gaps between tokens, concurrency. It cannot feed replies back token-exact,
wait for the request that one carries on, or read meta_info["keepkv"], so the other workloads have a client of ours.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.server_process import ServerError, ServerProcess

from . import measure, servers
from .workloads import AllAtOnce


def command(server: ServerProcess, model: str, load: AllAtOnce, out: Path) -> list[str]:
    """The command line of SGLang's client. `random-ids` needs no data set; a ratio of 1: all prompts of one length."""
    sizes = ["--random-input-len", str(load.prompt), "--random-output-len", str(load.new_tokens)]
    return [
        *(sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--base-url", server.base_url),
        *("--model", model, "--dataset-name", "random-ids", "--random-range-ratio", "1", *sizes, "--tokenize-prompt"),
        *("--num-prompts", str(load.requests), "--seed", str(load.seed), "--warmup-requests", "0", "--disable-tqdm"),
        *(("--max-concurrency", str(load.at_once)) if load.at_once else ()),
        *("--output-file", str(out)),
    ]


def run(server: ServerProcess, model: str, load: AllAtOnce) -> dict[str, float]:
    """One run of bench_serving: its numbers under the names of measure.py. ServerError with its last lines."""
    before = servers.state(server)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        done = subprocess.run(command(server, model, load, out), capture_output=True, text=True)
        if done.returncode != 0 or not out.exists():
            raise ServerError("bench_serving failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-15:]))
        result = json.loads(out.read_text().splitlines()[-1])
    return numbers(result, load, before, servers.state(server))


def numbers(result: dict[str, Any], load: AllAtOnce, before: Any, after: Any) -> dict[str, float]:
    """bench_serving's result under the names of measure.py; NaN for what it does not measure."""
    completed, seconds = int(result["completed"]), float(result["duration"])
    generated = int(result["total_output_tokens"])
    empty = measure.summarise([], seconds, before, after)
    out = dict.fromkeys(empty, math.nan) | measure.steps(seconds, generated - completed, before, after)
    out |= {
        "requests": load.requests,
        "errors": load.requests - completed,
        "seconds": seconds,
        "requests_per_s": result["request_throughput"],
        "generated_per_s": result["output_throughput"],
        "generated": generated,
        "mean_output": measure.ratio(generated, completed),
    }
    names = {"ttft": "ttft", "latency": "e2e_latency", "gap": "itl"}
    for ours, theirs in names.items():
        for p, word in ((50, "median"), (90, "p90"), (99, "p99")):
            out[f"{ours}_p{p}"] = result[f"{word}_{theirs}_ms"] / 1000
    return out
