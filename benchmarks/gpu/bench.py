"""Vote-weighted decode on a GPU: votes on against off, over budgets, contexts and batches.

    python -m benchmarks.gpu.bench [--out FOLDER] [--seconds N]     measures; writes bench.json as it goes
    python -m benchmarks.gpu.bench --small      every Triton kernel once on a small case (for compute-sanitizer)

The cases are those of cases.py. A budget of 0.1 of a context of 64k is a decode over 6,554 slots: what KeepKV
keeps. Times: CUDA events around replays of a CUDA graph of ten calls, median; where one of a row's two calls cannot be
captured, around the calls, and the row says why. GB/s: K and V read, 4 KiB per slot, over the time; the ceiling is a
device-to-device copy of 1 GiB, read plus written, measured in the same run. Outputs are compared: replays with calls,
kernels with each other, and each kernel's first and last request with float32. Exit status 1 when anything failed; what
is not installed, does not fit the GPU or comes too late is skipped, and bench.json says so.
Numbers of an H200: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.cases import KERNELS, SLOT_BYTES, Batch, missing, small
from benchmarks.gpu.report import write

CONTEXTS, BATCHES, BUDGETS = (2048, 8192, 32768, 65536), (1, 8, 64), (0.1, 0.2, 1.0)
POOL_BYTES = 20 << 30  # a case with more K and V is left out, and the table says so
L2_BYTES = 50 << 20  # a Hopper GPU's, where torch does not tell
CALLS = 10  # in one graph: the launch of a graph takes longer than the smallest of these calls
DECODE_SECONDS = 90  # no case begins later


class Result:
    """bench.json, written after every row. skipped: not installed, does not fit, no time. errors: anything else."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "bench.json"
        self.data: dict[str, Any] = {"rows": [], "skipped": [], "errors": []}

    def save(self) -> None:
        write(self.path, json.dumps(self.data, indent=1))

    def note(self, what: str, error: Exception) -> None:
        """Records why `what` has no result."""
        harmless = missing(error) or isinstance(error, torch.OutOfMemoryError)
        text = f"{what}: {type(error).__name__}: {str(error)[:500]}"
        self.data["skipped" if harmless else "errors"].append(text)
        print("skipped" if harmless else "ERROR", text, flush=True)
        self.save()


class Replay(NamedTuple):
    """A replay of CALLS calls, or None and why. wrong: it was captured, and does something else."""

    call: Callable[[], None] | None
    why: str = ""
    wrong: bool = False


def captured(function: Callable[[], None], out: torch.Tensor) -> Replay:
    """A CUDA graph of CALLS calls of function(), which has just run and written `out`.

    The replay's output is compared: a kernel on another stream is not in the graph, and its time would be nothing."""
    eager = out.clone()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                function()
    except RuntimeError as error:
        return Replay(None, f"not captured: {type(error).__name__}: {str(error)[:300]}")
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    difference, wrong = differs(out, eager)
    return Replay(None, f"the replay is off by {difference:.3g}", True) if wrong else Replay(graph.replay)


def seconds(function: Callable[[], None], per: int = 1) -> float:
    """Median of 5 groups of calls of about 20 ms each, behind two that are not counted; divided by `per`, which is how
    often function() does what is timed."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    calls = max(-(-3 // per), min(200, int(0.02 / max(time.perf_counter() - start, 1e-5))))
    groups = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        groups.append(begin.elapsed_time(end) / 1e3 / calls / per)
    return statistics.median(groups)


def copy_gb_per_s() -> float:
    """Read plus written, in 1e9 bytes, of a 1 GiB copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source)) / 1e9


def cases() -> Iterator[tuple[int, int, float]]:
    """Context, batch, budget; small ones first, so that a time limit cuts the largest."""
    every = [(c, b, r) for c in CONTEXTS for b in BATCHES for r in BUDGETS]
    yield from sorted(every, key=lambda case: case[0] * case[1] * case[2])


def differs(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, bool]:
    """Largest absolute difference, and whether it is too large. Results and softmax weights are rounded to bfloat16,
    8 bits, in each of two kernels: below 0.01 of the largest output; a wrong formula is off by a good part of it."""
    if not got.isfinite().all():
        return float("inf"), True
    difference = (got.float() - wanted.float()).abs().max().item()
    return difference, difference > 0.02 * wanted.float().abs().max().item() + 1e-3


def measure(case: Batch, kernel: str) -> tuple[dict[str, Any], list[torch.Tensor], list[str]]:
    """A row's times, the outputs with votes off and on, and the replays that compute something else."""
    calls, replays, outputs = [], [], []
    for votes in (False, True):
        call = case.call(kernel, votes)
        case.out.fill_(float("nan"))
        call()
        torch.cuda.synchronize()
        outputs.append(case.out.clone())
        calls.append(call)
        replays.append(captured(call, case.out))
    # Both in the same way: a launch from Python on one side only would be taken for the cost of votes.
    whole = [replay.call for replay in replays if replay.call]
    graph = len(whole) == 2
    off, on = [seconds(replay, CALLS) for replay in whole] if graph else [seconds(call) for call in calls]
    row = {"kernel": kernel, "graph": graph, "us_off": off * 1e6, "us_on": on * 1e6, "votes_cost": on / off - 1}
    told = [f"{name}: {replay.why}" for name, replay in zip(("votes off", "votes on"), replays, strict=True)]
    if not graph:
        row["eager_because"] = "; ".join(text for text, replay in zip(told, replays, strict=True) if replay.why)
    return row, outputs, [text for text, replay in zip(told, replays, strict=True) if replay.wrong]


def exact(case: Batch) -> list[torch.Tensor]:
    """Votes off and on, in float32 by torch: [first and last request, q heads, D]. What no kernel has to agree with
    another one for: where only ours is installed it is all there is."""
    return [torch.stack([case.exact(request, votes) for request in (0, -1)]) for votes in (False, True)]


def compare(
    row: dict[str, Any], outputs: list[torch.Tensor], base: list[torch.Tensor], wanted: list[torch.Tensor]
) -> str:
    """Adds differs_off and differs_on to the row, from the case's first kernel, whose own are 0, and differs_float32,
    the larger one from `wanted`, as exact() returns it. Says what is wrong."""
    pairs = zip(outputs, base, strict=True)
    off, on = [differs(got, other) for got, other in pairs]
    float32 = [differs(got[[0, -1]], right) for got, right in zip(outputs, wanted, strict=True)]
    row |= {"differs_off": off[0], "differs_on": on[0], "differs_float32": max(error for error, _ in float32)}
    names = ("votes off", "votes on", "votes off, from float32", "votes on, from float32")
    every = zip(names, (off, on, *float32), strict=True)
    return "; ".join(f"{name}: off by {error:.3g}" for name, (error, wrong) in every if wrong)


def warm_up(result: Result, without: list[str]) -> list[str]:
    """Calls every kernel once per batch size, since some constants of a kernel follow it, so that nothing compiles
    while time runs. Returns the kernels that work."""
    working = []
    for kernel in KERNELS:
        if kernel in without:
            result.data["skipped"].append(f"{kernel}: left out by --without")
            continue
        try:
            for batch in BATCHES:
                case = Batch(batch, 256)
                for votes in (False, True):
                    case.call(kernel, votes)()
            torch.cuda.synchronize()
            working.append(kernel)
        except Exception as error:  # the others still count
            result.note(kernel, error)
    return working


def decodes(result: Result, kernels: list[str], end: float) -> None:
    """Fills rows. end: time.monotonic() behind which no case begins. A kernel that fails is not tried again."""
    for context, batch, budget in cases():
        slots, what = max(1, round(context * budget)), f"{context} x {batch} at {budget}"
        if batch * slots * SLOT_BYTES > POOL_BYTES:
            result.data["skipped"].append(f"{what}: more than {POOL_BYTES >> 30} GiB of K and V")
            continue
        if time.monotonic() > end:
            result.data["skipped"].append(f"{what}: out of time")
            continue
        try:
            case = Batch(batch, slots)
            wanted = exact(case)
        except Exception as error:  # out of memory, or CUDA ended with a kernel before
            result.note(what, error)
            continue
        base: list[torch.Tensor] = []
        for kernel in list(kernels):
            try:
                row, outputs, stale = measure(case, kernel)
            except Exception as error:
                if not isinstance(error, torch.OutOfMemoryError):
                    kernels.remove(kernel)
                result.note(f"{kernel}, {what}", error)
                continue
            wrong = compare(row, outputs, base or outputs, wanted)
            base = base or ([] if wrong else outputs)  # nothing is compared with what is wrong
            row |= {"context": context, "batch": batch, "budget": budget, "slots": slots}
            # A replay finds in that cache part of what the one before it read.
            row |= {"in_l2": batch * slots * SLOT_BYTES < 3 * result.data.get("l2_bytes", L2_BYTES)}
            row |= {"gb_per_s": batch * slots * SLOT_BYTES / row["us_on"] / 1e3}
            result.data["rows"].append(row)
            for text in [*stale, *([wrong] if wrong else [])]:
                result.note(f"{kernel}, {what}", AssertionError(text))
            print(row, flush=True)
            result.save()
        del case


def bench(out: Path, seconds_left: float, without: list[str]) -> int:
    """Everything, within seconds_left; the exit status."""
    last = time.monotonic() + seconds_left
    result = Result(out)
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    result.data |= {"device": properties.name, "compute_capability": capability, "torch": torch.__version__}
    result.data["l2_bytes"] = getattr(properties, "L2_cache_size", 0) or L2_BYTES
    result.data["copy_gb_per_s"] = copy_gb_per_s()
    result.save()
    kernels = warm_up(result, without)
    result.save()
    decodes(result, kernels, min(time.monotonic() + DECODE_SECONDS, last))
    result.save()
    return int(bool(result.data["errors"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--seconds", type=float, default=170, help="of the whole measurement")
    parser.add_argument("--without", action="append", choices=KERNELS, default=[], help="a kernel to leave out")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    if options.small:
        small()
        return 0
    return bench(options.out, options.seconds, options.without)


if __name__ == "__main__":
    sys.exit(main())
