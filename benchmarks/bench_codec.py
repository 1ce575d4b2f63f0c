"""Times encode and decode of each codec beside a plain copy of memory, in one run.

    python benchmarks/bench_codec.py [--quick]

One layer's call over 8,192 tokens in scattered slots of a pool of twice as many, blocks of 64. GB/s: bytes read and
bytes written, those of the pool and those of the blocks together, per second; of a copy likewise (torch's copy_ on as
many threads, over as many bytes as the pool's part has). Contenders take turns and the median of each is printed; in
brackets the share of the copy's GB/s in the same rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from keepkv_sglang.kernels import codec
from keepkv_sglang.kernels.codec.layout import CODECS
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables

TOKENS = 8192
SHAPES = (
    (3, 64, torch.float32),
    (8, 128, torch.bfloat16),
    (8, 128, torch.float16),
)  # heads, dim, dtype: demo, 8B models


def medians(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds per call of each, called in turn for `seconds`, at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 5:
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(heads: int, dim: int, dtype: torch.dtype, seconds: float) -> list[str]:
    keys, values = (torch.randn(2 * TOKENS, heads, dim).to(dtype) for _ in range(2))
    slots = torch.randperm(2 * TOKENS)[:TOKENS]
    count = TOKENS // codec.BLOCK_TOKENS
    blocks, counts = torch.arange(count), torch.full((count,), codec.BLOCK_TOKENS)
    source, target = torch.cat([keys[:TOKENS], values[:TOKENS]]), torch.empty_like(torch.cat([keys[:TOKENS]] * 2))
    pool_bytes = source.nbytes
    calls: dict[str, Callable[[], object]] = {"copy": partial(target.copy_, source)}
    moved = {"copy": 2 * pool_bytes}
    for name in CODECS:
        layout = codec.BlockLayout(name, heads, dim, dim, dtype)
        arena = torch.zeros(count, layout.block_bytes, dtype=torch.uint8)
        calls[f"{name} encode"] = partial(codec.encode, layout, keys, values, slots, arena, blocks, counts)
        calls[f"{name} decode"] = partial(codec.decode, layout, arena, blocks, counts, keys, values, slots)
        moved |= {f"{name} {way}": pool_bytes + arena.nbytes for way in ("encode", "decode")}
    found = medians(calls, seconds)
    rates = {name: moved[name] / took / 1e9 for name, took in found.items()}
    cells = [f"{rate:.1f} ({rate / rates['copy']:.0%})" for name, rate in rates.items() if name != "copy"]
    return [f"{heads} x {dim} {str(dtype).removeprefix('torch.')}", f"{rates['copy']:.1f}", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 s per line instead of 6 s")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{platform.machine()}, torch {torch.__version__}, commit {commit()}; GB/s read and written (share of a copy's)"
    )
    columns = "heads x dim", "copy", *(f"{name} {way}" for name in CODECS for way in ("encode", "decode"))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        lines = [measure(*shape, 1.0 if args.quick else 6.0) for shape in SHAPES]
        print(f"\n{threads} thread(s)\n" + tables.plain(columns, lines), flush=True)


if __name__ == "__main__":
    main()
