"""Times the CPU attention kernels against what SGLang's torch_native backend does, in one run.

    python benchmarks/bench_attention.py [--threads 1] [--dtype float32] [--quick] [--kernel cpp]

Each case is timed in interleaved rounds (one call of each contender per round, so that a noisy neighbour hits all of
them) and the median round is printed: microseconds per layer call and, in brackets, torch_native's time over ours.
Ours computes votes; torch_native has none, which only favours it. Slots are scattered. One kernel of ours per process:
the OpenMP runtime that numba brings makes torch's own threads several times slower.

With cpp also what votes cost (interleaved with itself without them), its share of what reading the same rows and
nothing else takes (read_rows.cpp), and what votes cost where slots follow each other, as an allocator hands them out.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from keepkv_sglang.kernels import attention, cpu_build
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables

HEADS_Q, HEADS_KV, DIM = 9, 3, 64
DECODE = [(1, 256), (1, 2048), (8, 256), (8, 2048), (32, 256), (32, 2048)]
EXTEND = [(0, 1500), (2000, 16), (2000, 128), (500, 500)]  # cached, new


def torch_native(q, k_pool, v_pool, req_to_token, rows, seq_lens, extend_lens, scale, out) -> None:
    """SGLang 0.5.23, torch_native_backend.py: per request, gather K/V, SDPA; cached queries are computed
    again."""
    query = q.movedim(0, 1)
    start = 0
    for i in range(seq_lens.shape[0]):
        length, new = seq_lens[i], extend_lens[i]
        end = start + new
        slots = req_to_token[rows[i], :length]
        k, v = k_pool[slots].movedim(0, 1), v_pool[slots].movedim(0, 1)
        mine = query[:, start:end, :]
        if decode := q.shape[0] == seq_lens.shape[0] and new == 1:
            padded = mine
        else:
            padded = torch.empty((mine.shape[0], length, mine.shape[2]), dtype=mine.dtype)
            padded[:, length - new :, :] = mine
        done = scaled_dot_product_attention(
            padded[None], k[None], v[None], enable_gqa=True, scale=scale, is_causal=not decode
        )
        done = done.squeeze(0).movedim(1, 0)
        out[start:end] = done if decode else done[length - new :]
        start = end


def sdpa_new_queries(q, k_pool, v_pool, req_to_token, rows, seq_lens, extend_lens, scale, out) -> None:
    """The best plain-torch extend without votes: one request, SDPA on the new queries only."""
    length, new = int(seq_lens[0]), int(extend_lens[0])
    slots = req_to_token[rows[0], :length]
    k, v = (pool.index_select(0, slots).transpose(0, 1)[None] for pool in (k_pool, v_pool))
    query = q.transpose(0, 1)[None]
    if new == length:
        done = scaled_dot_product_attention(query, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        done = scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    out.copy_(done[0].transpose(0, 1))


def make(batch: int, length: int, new: int, dtype: torch.dtype) -> tuple:
    slots = max(4096, batch * length)
    k, v = (torch.randn(slots, HEADS_KV, DIM).to(dtype) for _ in range(2))
    votes = torch.rand(slots, HEADS_KV) * 2
    table = torch.randperm(slots)[: batch * length].to(torch.int32).view(batch, length)
    q = torch.randn(batch * new, HEADS_Q, DIM).to(dtype)
    lens, news = torch.full((batch,), length), torch.full((batch,), new)
    return q, k, v, votes, table, torch.arange(batch), lens, news, DIM**-0.5, torch.empty_like(q)


def medians(contenders: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 5:
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(t) for name, t in times.items()}


def row(label: str, contenders: dict[str, Callable[[], None]], seconds: float) -> list[str]:
    found = medians(contenders, seconds)
    base = found["torch_native"]
    return [label, *(f"{us:.0f} ({base / us:.1f}x)" for us in found.values())]


def reader(folder: str) -> Callable[..., None]:
    """keepkv_read of read_rows.cpp, compiled as the kernels are."""
    library = f"{folder}/read_rows.so"
    source = str(Path(__file__).with_name("read_rows.cpp"))
    command = [*cpu_build.compiler(), *cpu_build.FLAGS, "-march=native", "-fopenmp", "-shared", source, "-o", library]
    subprocess.run(command, check=True)
    read = ctypes.CDLL(library).keepkv_read
    read.restype = ctypes.c_float

    def call(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        row, threads = k.stride(0), torch.get_num_threads()
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (k, v, slots)]
        read(*pointers, ctypes.c_int64(slots.numel()), ctypes.c_int64(row), ctypes.c_int64(threads))

    return call


def votes_and_bandwidth(seconds: float) -> None:
    """cpp alone, float32: with votes over without, and bytes of K and V per second over the reader's."""
    cpp = attention.load("cpp")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        read = reader(folder)
        for batch, length in DECODE:
            q, k, v, votes, table, rows, lens, _, scale, out = make(batch, length, 1, torch.float32)
            flat = table.flatten().contiguous()
            calls: dict[str, Callable[[], None]] = {
                "votes": lambda: cpp.decode(q, k, v, votes, table, rows, lens, scale, out),  # noqa: B023
                "none": lambda: cpp.decode(q, k, v, None, table, rows, lens, scale, out),  # noqa: B023
                "read": lambda: read(k, v, flat),  # noqa: B023
            }
            found = medians(calls, seconds)
            size = 2 * batch * length * HEADS_KV * DIM * 4 / 1e3
            line = [f"{batch} x {length}", f"{found['votes']:.0f}", f"{found['votes'] / found['none'] - 1:.1%}"]
            line += [f"{size / found[name]:.1f}" for name in ("votes", "read")]
            line += [f"{found['read'] / found['votes']:.0%}"]
            table.copy_(torch.arange(table.numel()).view(table.shape))
            found = medians({"votes": calls["votes"], "none": calls["none"]}, seconds)
            lines.append([*line, f"{found['votes'] / found['none'] - 1:.1%}"])
    columns = "cpp decode", "us", "votes cost", "GB/s", "reading alone", "share", "votes, in a row"
    print("\n" + tables.plain(columns, lines))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kernel", choices=attention.ORDER, default="cpp")
    parser.add_argument("--quick", action="store_true", help="0.3 s per case instead of 2 s")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype, seconds = getattr(torch, args.dtype), 0.3 if args.quick else 2.0
    kernel = attention.load(args.kernel)
    print(f"{platform.machine()}, torch {torch.__version__}, commit {commit()}")
    shape = f"{HEADS_Q} q / {HEADS_KV} kv heads, head_dim {DIM}"
    print(f"{args.threads} thread(s), {args.dtype}, {shape}; us per call (times faster than torch_native)")
    lines = []
    for batch, length in DECODE:
        q, k, v, votes, table, rows, lens, news, scale, out = make(batch, length, 1, dtype)
        calls: dict[str, Callable[[], None]] = {
            "torch_native": lambda: torch_native(q, k, v, table, rows, lens, news, scale, out)  # noqa: B023
        }
        calls[args.kernel] = lambda: kernel.decode(q, k, v, votes, table, rows, lens, scale, out)  # noqa: B023
        lines.append(row(f"{batch} x {length}", calls, seconds))
    print("\n" + tables.plain(("decode batch x KV", "torch_native", args.kernel), lines), flush=True)
    lines = []
    for cached, new in EXTEND:
        q, k, v, votes, table, rows, lens, news, scale, out = make(1, cached + new, new, dtype)
        calls = {
            "torch_native": lambda: torch_native(q, k, v, table, rows, lens, news, scale, out),  # noqa: B023
            "SDPA new only": lambda: sdpa_new_queries(q, k, v, table, rows, lens, news, scale, out),  # noqa: B023
        }
        calls[args.kernel] = lambda: kernel.extend(q, k, v, votes, table, rows, lens, news, scale, out)  # noqa: B023
        lines.append(row(f"{cached} + {new}", calls, seconds))
    columns = "extend cached + new", "torch_native", "SDPA new only", args.kernel
    print("\n" + tables.plain(columns, lines), flush=True)
    if args.kernel == "cpp":
        votes_and_bandwidth(seconds)


if __name__ == "__main__":
    main()
