"""Packed spans beside ordinary ones on a CPU: attention over the same number of cells, and the compression.

    python benchmarks/bench_packed.py [--threads 1] [--dtype float32] [--quick] [--tokens 1500]

Attention: rows of one system prompt, one compressed part and 64 recent tokens; in the packed rows the compressed part's
cells are shared out at random over three layers and their heads, so that a head has from none to three times the mean.
The layer with the mean number of cells is timed, in interleaved rounds; medians of microseconds. Compression: a turn of
random keys over the demo model's shape, `uniform`, `layer` and `all`, interleaved; medians of seconds.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import torch
from bench_attention import medians

from keepkv_sglang.compress.batch import SCRATCH_BYTES, Rows, Storage, compress_rows
from keepkv_sglang.compress.packed import compress_packed
from keepkv_sglang.compress.select import left_raw
from keepkv_sglang.kernels.attention import cpp_impl
from keepkv_sglang.kernels.attention.packed import Layers, Packed
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables

HEADS_Q, HEADS_KV, DIM, LAYERS = 9, 3, 64, 3
PROMPT, RECENT = 128, 64
DECODE = [(1, 256), (1, 2048), (8, 2048), (32, 2048)]
EXTEND = [(2048, 16), (2048, 128), (2048, 512)]  # cached, new
MODEL_LAYERS = 30


def shared_out(m: int) -> torch.Tensor:
    """int64 [LAYERS * HEADS_KV + 1]: run starts of m slots; layer 1 has as many cells as it would have unshared."""
    mean = m * HEADS_KV
    counts = []
    for total in (mean // 2, mean, m * LAYERS * HEADS_KV - mean // 2 - mean):
        parts = torch.rand(HEADS_KV).cumsum(0)
        cuts = (parts / parts[-1] * total).round().long()
        counts += cuts.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    return torch.tensor([0, *counts]).cumsum(0)


def attention(batch: int, length: int, new: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    slots = batch * (length + new)
    keys, values = ([torch.randn(slots, HEADS_KV, DIM).to(dtype) for _ in range(LAYERS)] for _ in range(2))
    votes = [torch.rand(slots, HEADS_KV) * 2 for _ in range(LAYERS)]
    table = torch.randperm(slots).to(torch.int32).view(batch, length + new)
    q = torch.randn(batch * max(1, new), HEADS_Q, DIM).to(dtype)
    out, rows, lens = torch.empty_like(q), torch.arange(batch), torch.full((batch,), length + new)
    news, scale = torch.full((batch,), new), DIM**-0.5
    packed_slots = table[:, PROMPT : length - RECENT].contiguous()
    m = packed_slots.shape[1]
    raw = torch.cat([table[:, :PROMPT], table[:, length - RECENT :]], 1).contiguous()
    raw_lens = torch.full((batch,), raw.shape[1])
    packed = Packed(
        Layers(keys, values, votes), torch.arange(batch + 1), torch.arange(batch + 1) * m, packed_slots.flatten(),
        torch.stack([shared_out(m) for _ in range(batch)]), 1,
    )  # fmt: skip
    pools = keys[1], values[1], votes[1]
    if not new:
        return {
            "uniform": lambda: cpp_impl.decode(q, *pools, table, rows, lens, scale, out),
            "packed": lambda: cpp_impl.decode(q, *pools, raw, rows, raw_lens, scale, out, packed),
        }
    return {
        "uniform": lambda: cpp_impl.extend(q, *pools, table, rows, lens, news, scale, out),
        "packed": lambda: cpp_impl.extend(q, *pools, raw, rows, raw_lens, news, scale, out, packed=packed),
    }


def compression(tokens: int, budget: float, heads: str) -> Callable[[], None]:
    torch.manual_seed(0)
    config = KeepKVConfig(enabled=True, budget=budget, heads=heads)
    m = -int(-tokens * budget // 1)
    slots = tokens + m
    keys, values = ([torch.randn(slots, HEADS_KV, DIM) for _ in range(MODEL_LAYERS)] for _ in range(2))
    for layer, layer_keys in enumerate(keys):  # some heads look at few tokens, others at many
        layer_keys *= 0.3 + 1.4 * torch.rand(HEADS_KV, 1) + layer / MODEL_LAYERS
    votes = [torch.zeros(slots, HEADS_KV) for _ in range(MODEL_LAYERS)]
    storage = Storage(keys, values, votes, [DIM**-0.5] * MODEL_LAYERS)
    rows = Rows(torch.arange(0), torch.arange(tokens), torch.arange(tokens, slots))
    queries = [torch.randn(config.references + config.window, HEADS_Q, DIM) for _ in range(MODEL_LAYERS)]
    index = torch.cat([torch.full((config.references,), tokens), torch.arange(tokens - config.window, tokens)])
    policy = span_policy(config, m, sinks=config.sinks)
    left = left_raw(policy, tokens)

    @torch.inference_mode()
    def call() -> None:
        shared = storage, rows, queries.__getitem__, HEADS_Q, index, policy
        if heads == "uniform":
            list(compress_rows(*shared, SCRATCH_BYTES))
        else:
            list(compress_packed(*shared, left, SCRATCH_BYTES, lambda *_: None))

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quick", action="store_true", help="0.3 s per case instead of 2 s")
    parser.add_argument("--tokens", type=int, default=1500, help="of the compressed turn")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype, seconds = getattr(torch, args.dtype), 0.3 if args.quick else 2.0
    print(f"{platform.machine()}, torch {torch.__version__}, commit {commit()}, {args.threads} thread(s), {args.dtype}")
    lines = []
    for batch, length, new in [(b, n, 0) for b, n in DECODE] + [(1, n, new) for n, new in EXTEND]:
        found = medians(attention(batch, length, new, dtype), seconds)
        uniform, packed = found["uniform"], found["packed"]
        label = f"extend {length} + {new}" if new else f"decode {batch} x {length}"
        lines.append([label, f"{uniform:.0f}", f"{packed:.0f}", f"{packed / uniform:.2f}"])
    print("\n" + tables.plain(("attention", "uniform us", "packed us", "ratio"), lines), flush=True)
    lines = []
    for budget in (0.1, 0.2):
        calls = {heads: compression(args.tokens, budget, heads) for heads in ("uniform", "layer", "all")}
        found = medians(calls, seconds)
        times = [f"{1e-6 * found[name]:.2f} ({found[name] / found['uniform']:.2f})" for name in calls]
        lines.append([f"{args.tokens} tokens, {budget:.0%}", *times])
    print("\n" + tables.plain(("compression", "uniform s", "layer", "all"), lines), flush=True)


if __name__ == "__main__":
    main()
