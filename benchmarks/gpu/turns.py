"""Compression as the server does it, and attention of a prefill with votes, on a GPU: an 8B-shaped model, 32 layers.

    python -m benchmarks.gpu.turns [--out FOLDER] [--seconds N]      writes turns.json as it goes

Per case (CASES) and variant (VARIANTS): the first call's seconds, which compile and load what is not there yet, the
median of later ones, the GPU's kernels (torch.profiler), host synchronisations (torch.cuda.set_sync_debug_mode),
operations (a TorchDispatchMode) and the most memory beyond what K, V and queries take. Prefill: SGLang's Triton extend
with and without votes, beside torch's scaled_dot_product_attention, which has no votes. Nothing begins later than N
seconds; what did not is named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.bench import seconds
from benchmarks.gpu.cases import DIM, DTYPE, HEADS, HEADS_KV, Batch
from benchmarks.gpu.report import write
from keepkv_sglang.compress.batch import Rows, Storage, compress_rows
from keepkv_sglang.compress.select import SpanPolicy

LAYERS = 32
WINDOW, REFERENCES = 32, 256  # query tokens: what a server scores with by default


@dataclass(frozen=True)
class Case:
    """A span of `span` slots behind `context` others, to `kept`; behind: all queries lie behind the span."""

    name: str
    context: int
    span: int
    kept: int
    behind: bool = False


CASES = (
    Case("turn", 0, 500, 50),
    Case("reply", 500, 128, 13),
    Case("reply", 6500, 128, 13),
    Case("reply", 13000, 128, 13),
    Case("pressure", 0, 2000, 1000, behind=True),
    Case("turn", 0, 2000, 200),
    Case("turn", 0, 8000, 800),
    Case("turn", 0, 32000, 3200),
    Case("turn", 0, 128000, 12800),
)
VARIANTS = (("triton", 1024), ("triton", 128), ("torch", 1024), ("torch", 128))  # kernels, MiB of scratch
PREFILLS = ((0, 2048), (0, 8192), (0, 32768), (1600, 1024), (6554, 8192))  # slots before, new tokens


class Count(TorchDispatchMode):
    """How many operations torch was asked for; views included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def compression(case: Case, scratch: int) -> Callable[[], None]:
    """One call compresses the case's span in every layer."""
    total = case.context + case.span + case.kept
    k, v = ([torch.randn(total, HEADS_KV, DIM, device="cuda", dtype=DTYPE) for _ in range(LAYERS)] for _ in range(2))
    votes = [torch.zeros(total, HEADS_KV, device="cuda") for _ in k]
    q = torch.randn(WINDOW + REFERENCES, HEADS, DIM, device="cuda", dtype=DTYPE)
    last = torch.full((REFERENCES,), case.span)
    window = last[:WINDOW] if case.behind else torch.arange(case.span - WINDOW, case.span)
    index = torch.cat([last, window])
    slots = torch.randperm(total, device="cuda")
    rows = Rows(*slots.split([case.context, case.span, case.kept]))
    storage = Storage(k, v, votes, [DIM**-0.5] * LAYERS)
    policy = SpanPolicy(
        case.kept, "attention_matching", recent=64 if case.kept > 100 else 0, sinks=0 if case.context else 4,
        threshold=0.85, scorer="window_references",
    )  # fmt: skip

    def call() -> None:
        for _ in compress_rows(storage, rows, lambda _: q, HEADS, index, policy, scratch << 20):
            pass

    return call


def once(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def syncs(call: Callable[[], None]) -> int:
    """How often the host waited for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def kernels(call: Callable[[], None], most: int = 8) -> dict[str, float]:
    """Milliseconds on the GPU by kernel, the longest ones; "all": their sum."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = sorted(((e.self_device_time_total / 1e3, e.key[:60]) for e in profile.key_averages()), reverse=True)
    return {"all": sum(ms for ms, _ in found), **{name: ms for ms, name in found[:most]}}


def measured(case: Case, scratch: int) -> dict[str, Any]:
    call = compression(case, scratch)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = once(call)
    row: dict[str, Any] = {"first_s": first, "peak_mib": (torch.cuda.max_memory_allocated() - held) / 2**20}
    if first < 15:
        row["s"] = statistics.median(once(call) for _ in range(5 if first < 2 else 1))
    if first < 5:
        row["parts_ms"] = kernels(call)
        row["syncs"] = syncs(call)
        with Count() as count:
            call()
        row["operations"] = count.count
    return row


def prefill(before: int, new: int) -> dict[str, float]:
    """Microseconds of one layer."""
    batch = Batch(1, before + new)
    off, on = (batch.sglang_extend(new, votes) for votes in (False, True))
    q = torch.randn(1, HEADS, new, DIM, device="cuda", dtype=DTYPE)
    k, v = (torch.randn(1, HEADS_KV, before + new, DIM, device="cuda", dtype=DTYPE) for _ in range(2))
    mask: Any = {"attn_mask": causal_lower_right(new, before + new)} if before else {"is_causal": True}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls = {"off": off, "on": on, "sdpa": lambda: sdpa(q, k, v, enable_gqa=True, **mask)}
    return {f"us_{name}": 1e6 * seconds(call) for name, call in calls.items()}


def measure(out: Path, limit: float, variants: tuple[tuple[str, int], ...]) -> int:
    """Exit status 1 when something failed for another reason than memory or time."""
    end, data = time.monotonic() + limit, {"turns": [], "prefill": [], "skipped": [], "errors": []}

    def case(kind: str, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() > end:
            data["skipped"].append(f"{row}: out of time")
        else:
            try:
                row |= work()
                data[kind].append(row)
            except Exception as error:
                kind = "skipped" if isinstance(error, torch.OutOfMemoryError) else "errors"
                data[kind].append(f"{row}: {type(error).__name__}: {str(error)[:500]}")
            torch.cuda.empty_cache()
            print(row, *data["errors"][-1:], flush=True)
        write(out / "turns.json", json.dumps(data, indent=1))

    out.mkdir(parents=True, exist_ok=True)
    for before, new in PREFILLS:
        case("prefill", {"before": before, "new": new}, lambda before=before, new=new: prefill(before, new))
    for one in CASES:
        for kernel, scratch in variants:
            row = {"case": one.name, "context": one.context, "tokens": one.span, "kernel": kernel, "mib": scratch}
            with patch.dict("os.environ", KEEPKV_GPU_KERNEL=kernel):
                case("turns", row, lambda one=one, scratch=scratch: measured(one, scratch))
    return int(bool(data["errors"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="only the first so many")
    options = parser.parse_args()
    return measure(options.out, options.seconds, VARIANTS[: options.variants])


if __name__ == "__main__":
    sys.exit(main())
