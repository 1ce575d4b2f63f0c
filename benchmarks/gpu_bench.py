"""Vote-weighted decode on a GPU: votes on against off, over budgets, contexts and batches.

    python benchmarks/gpu_bench.py [--out FOLDER]      measures; writes bench.json as it goes
    python benchmarks/gpu_bench.py --small             every Triton kernel once on a small case (for compute-sanitizer)
    python benchmarks/gpu_bench.py --report FOLDER     report.md and report.json of scripts/gpu_check.sh

One layer of a Llama-3-8B: 32 query heads, 8 kv heads, head_dim 128, bfloat16, page size 1, slots scattered at random. A
budget of 0.1 of a context of 64k is a decode over 6,554 slots: what KeepKV keeps. Times: CUDA events around a CUDA-free
loop after a warm-up, median. GB/s: K and V read, 4 KiB per slot, over the time; the ceiling is a device-to-device copy
of 1 GiB, read plus written, measured in the same run. Never run by us: no GPU was at hand (kernels/README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from keepkv_sglang.kernels.attention import triton_impl
from keepkv_sglang.origin import commit

HEADS, HEADS_KV, DIM, DTYPE = 32, 8, 128, torch.bfloat16
SLOT_BYTES = 2 * HEADS_KV * DIM * 2
CONTEXTS, BATCHES, BUDGETS = (2048, 8192, 32768, 65536), (1, 8, 64), (0.1, 0.2, 1.0)
POOL_BYTES = 20 << 30  # a case with more K and V is left out, and the table says so
SECONDS = 90  # no case begins later; gpu_check.sh gives the whole 140, compression at the end included
COMPRESSED_LAYERS = 8


class Batch:
    """Scattered slots for `batch` requests of `slots` slots each, and a contract's arguments."""

    def __init__(self, batch: int, slots: int) -> None:
        total = batch * slots
        self.k, self.v = (torch.randn(total, HEADS_KV, DIM, device="cuda", dtype=DTYPE) for _ in range(2))
        self.votes = torch.rand(total, HEADS_KV, device="cuda")
        self.table = torch.randperm(total, device="cuda").int().view(batch, slots)
        self.rows = torch.arange(batch, device="cuda")
        self.lens = torch.full((batch,), slots, device="cuda")
        self.q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=DTYPE)
        self.out = torch.empty_like(self.q)
        self.indptr = (torch.arange(batch + 1, device="cuda") * slots).int()
        self.indices = self.table.flatten().long()
        self.scale = DIM**-0.5

    def ours(self, votes: bool) -> Callable[[], None]:
        log_votes = self.votes if votes else None
        return lambda: triton_impl.decode(
            self.q, self.k, self.v, log_votes, self.table, self.rows, self.lens, self.scale, self.out
        )

    def sglang(self, votes: bool) -> Callable[[], None]:
        """SGLang's Triton decode; ImportError without SGLang."""
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

        from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, vote_score_mod

        splits = 16
        shape = (*self.q.shape[:2], splits)
        part = torch.empty(*shape, DIM, device="cuda")
        lse = torch.empty(shape, device="cuda")
        count = torch.full((len(self.lens),), splits, dtype=torch.int32, device="cuda")
        mod: dict[str, Any] = {}
        if votes:
            table = VoteTable([self.votes], HEADS // HEADS_KV)
            table.point(self.indptr, self.indices)
            mod = {"score_mod": vote_score_mod, "aux_tensors": table.aux(0)}
        arguments = (self.indptr, self.indices, part, lse, count, splits, self.scale, 1.0, 1.0)
        return lambda: decode_attention_fwd(self.q, self.k, self.v, self.out, *arguments, **mod)

    def flashinfer(self, votes: bool) -> Callable[[], None]:
        """FlashInfer's decode without tensor cores; ImportError without FlashInfer."""
        import flashinfer

        from keepkv_sglang.kernels.attention.flashinfer_variants import decode_args

        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        jit = {"jit_args": decode_args(DTYPE, DIM)} if votes else {}
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", **jit)
        last = torch.ones(len(self.lens), dtype=torch.int32, device="cuda")
        kind = {"q_data_type": DTYPE, "kv_data_type": DTYPE}
        wrapper.plan(self.indptr, self.indices.int(), last, HEADS, HEADS_KV, DIM, 1, **kind)
        cache = (self.k[:, None], self.v[:, None])
        extra = (self.votes, self.scale) if votes else ()
        return lambda: wrapper.run(self.q, cache, *extra, out=self.out)


def seconds(function: Callable[[], None]) -> float:
    """Median of 5 groups of calls of about 20 ms each; the first call, which compiles, is not counted."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    calls = max(3, min(200, int(0.02 / max(time.perf_counter() - start, 1e-5))))
    groups = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        groups.append(begin.elapsed_time(end) / 1e3 / calls)
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


def compression(n: int, kernel: str, device: str = "cuda") -> float:
    """Milliseconds a layer for a prompt of n tokens to a tenth, default scorer and rule, 256 + 32 query tokens, as the
    server does it; kernel: KEEPKV_GPU_KERNEL."""
    from keepkv_sglang.layer_batch import SCRATCH_BYTES, Rows, Storage, compress_rows
    from keepkv_sglang.selection import SpanPolicy

    m = n // 10
    index = torch.cat([torch.full((256,), n), torch.arange(n - 32, n)]).to(device)
    k, v = (
        [torch.randn(n + m, HEADS_KV, DIM, device=device, dtype=DTYPE) for _ in range(COMPRESSED_LAYERS)]
        for _ in range(2)
    )
    votes = [torch.zeros(n + m, HEADS_KV, device=device) for _ in k]
    q = torch.randn(288, HEADS, DIM, device=device, dtype=DTYPE)
    slots = torch.arange(n + m, device=device)
    storage, rows = Storage(k, v, votes, [DIM**-0.5] * len(k)), Rows(slots[:0], slots[:n], slots[n:])
    policy = SpanPolicy(m, "attention_matching", recent=64, sinks=4, threshold=0.85, scorer="window_references")

    def call() -> None:
        for _ in compress_rows(storage, rows, lambda _: q, HEADS, index, policy, SCRATCH_BYTES):
            pass

    with patch.dict(os.environ, KEEPKV_GPU_KERNEL=kernel):
        return 1e3 * seconds(call) / len(k)


def compressions(result: dict[str, Any], write: Callable[[], None]) -> None:
    """Fills result["compression"]. Behind everything else: a kernel that has never run may end this process's CUDA."""
    for n in (2000, 8000):
        row: dict[str, Any] = {"tokens": n}
        for kernel in ("torch", "triton"):
            try:
                row[f"{kernel}_ms"] = compression(n, kernel)
            except Exception as error:
                result["skipped"].append(f"compression of {n} tokens, {kernel}: {type(error).__name__}: {error}")
        result["compression"].append(row)
        write()


def bench(out: Path) -> None:
    """Writes out/bench.json after every case."""
    properties = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_gb_per_s": copy_gb_per_s(),
        "compression": [],
        "rows": [],
        "skipped": [],
    }
    missing: set[str] = set()
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for context, batch, budget in cases():
        slots = max(1, round(context * budget))
        if batch * slots * SLOT_BYTES > POOL_BYTES:
            result["skipped"].append(f"{context} x {batch} at {budget}: more than {POOL_BYTES >> 30} GiB of K and V")
            continue
        if time.monotonic() - begun > SECONDS:
            result["skipped"].append(f"{context} x {batch} at {budget}: out of time")
            continue
        try:
            arguments = Batch(batch, slots)
        except torch.cuda.OutOfMemoryError:
            result["skipped"].append(f"{context} x {batch} at {budget}: does not fit this GPU")
            continue
        for name in ("ours", "sglang", "flashinfer"):
            if name in missing:
                continue
            try:
                off, on = (seconds(getattr(arguments, name)(votes)) for votes in (False, True))
            except Exception as error:  # not installed, does not compile, out of memory: the others still count
                if not isinstance(error, torch.cuda.OutOfMemoryError):
                    missing.add(name)
                result["skipped"].append(f"{name}, {context} x {batch} at {budget}: {type(error).__name__}: {error}")
                continue
            row = {"kernel": name, "context": context, "batch": batch, "budget": budget, "slots": slots}
            row |= {"us_off": off * 1e6, "us_on": on * 1e6, "votes_cost": on / off - 1}
            row |= {"gb_per_s": batch * slots * SLOT_BYTES / on / 1e9}
            result["rows"].append(row)
            print(row, flush=True)
            (out / "bench.json").write_text(json.dumps(result, indent=1))
        del arguments

    def write() -> None:
        (out / "bench.json").write_text(json.dumps(result, indent=1))

    write()
    compressions(result, write)


def small() -> None:
    """Every Triton kernel of ours on a few hundred keys: for compute-sanitizer, which is a hundred times slower."""
    from keepkv_sglang.kernels.merge import triton_impl as merge
    from keepkv_sglang.kernels.merge.torch_impl import Segments
    from keepkv_sglang.kernels.score import triton_impl as score

    batch = Batch(2, 130)
    batch.ours(True)()
    lens, new = batch.lens, torch.tensor([3, 130], device="cuda")
    q = torch.randn(133, HEADS, DIM, device="cuda", dtype=DTYPE)
    out = torch.empty_like(q)
    shared = (q, batch.k, batch.v, batch.votes, batch.table, batch.rows, lens, new, batch.scale, out)
    triton_impl.extend(*shared)
    k = torch.randn(2, 130, DIM, device="cuda")
    queries, position = torch.randn(2, 32, DIM, device="cuda"), torch.arange(98, 130, device="cuda")
    lv, weights = torch.zeros(130, 2, device="cuda"), torch.ones(2, 32, device="cuda")
    for dtype in (torch.float32, DTYPE):
        keys = k.transpose(0, 1).to(dtype)
        score.window_sums(queries, position, keys[:50], lv[:50], keys, keys, lv, weights, True)
    order = torch.randperm(130, device="cuda").expand(2, -1).contiguous()
    merge.nearest_kept(k, order[:, :100].contiguous(), order[:, 100:].contiguous(), order[:, 100:] % 2 == 0, 1 << 20)
    seg = Segments.from_assignment(torch.arange(130, device="cuda").expand(2, -1) % 20, 20)
    merge.merge_segments(k, k, lv.T.contiguous(), torch.zeros(260, device="cuda"), seg)
    for pool in (batch.k, batch.votes):
        merge.gather_slots(pool, order[0, :50], pool.new_empty(pool.shape[1], 50, *pool.shape[2:]))
    torch.cuda.synchronize()
    print("small: every kernel ran")


def report(folder: Path) -> None:
    """report.md and report.json from what the steps of gpu_check.sh left in the folder."""
    steps = [line.split() for line in (folder / "steps.txt").read_text().splitlines()]
    bench_file = folder / "bench.json"
    measured = json.loads(bench_file.read_text()) if bench_file.exists() else None
    whole: dict[str, Any] = {"commit": commit(), "steps": {}, "bench": measured}
    lines = [f"# scripts/gpu_check.sh, commit {whole['commit']}", "", "| step | exit | tests |", "|---|---|---|"]
    for name, code in steps:
        tests = _tests(folder / f"{name}.xml")
        whole["steps"][name] = {"exit": code, "tests": tests}
        lines.append(f"| {name} | {code} | {tests or ''} |")
    if measured:
        ceiling = measured["copy_gb_per_s"]
        lines += ["", f"{measured['device']}, torch {measured['torch']}; copy {ceiling:.0f} GB/s.", ""]
        lines += [
            "| kernel | context | batch | budget | us, votes off | on | votes cost | GB/s | of copy |",
            "|---|" * 1,
        ]
        lines[-1] = "|---" * 9 + "|"
        for row in measured["rows"]:
            lines.append(
                f"| {row['kernel']} | {row['context']} | {row['batch']} | {row['budget']} | {row['us_off']:.1f}"
                f" | {row['us_on']:.1f} | {row['votes_cost']:+.1%} | {row['gb_per_s']:.0f}"
                f" | {row['gb_per_s'] / ceiling:.0%} |"
            )
        lines += ["", "| compression, tokens | torch, ms a layer | Triton, ms a layer |", "|---|---|---|"]
        for row in measured["compression"]:
            times = (f"{row[name]:.2f}" if name in row else "failed" for name in ("torch_ms", "triton_ms"))
            lines.append(f"| {row['tokens']} | {' | '.join(times)} |")
        lines += ["", *(f"- skipped: {text}" for text in measured["skipped"])]
    (folder / "report.json").write_text(json.dumps(whole, indent=1))
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _tests(xml: Path) -> str:
    if not xml.exists():
        return ""
    suite = next(iter(ET.parse(xml).getroot().iter("testsuite")))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return f"{suite.get('tests')} run, {failed} failed, {suite.get('skipped')} skipped"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if options.report:
        report(options.report)
    elif not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    elif options.small:
        small()
    else:
        bench(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
