"""Times encode and decode of each codec between a GPU's pool and pinned host memory, beside a plain copy.

    python -m benchmarks.gpu.codec [--tokens N]

One layer of an 8B model (8 kv heads, head size 128, bfloat16), scattered slots. GB/s: bytes of the host's blocks per
second, median of CUDA events; of a copy of as many bytes likewise (cudaMemcpyAsync, pinned).
"""

from __future__ import annotations

import argparse

import torch
from triton.testing import do_bench

from keepkv_sglang.kernels import codec
from keepkv_sglang.kernels.codec import triton_impl
from keepkv_sglang.kernels.codec.layout import CODECS

HEADS, DIM, DTYPE = 8, 128, torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    keys, values = (torch.randn(2 * tokens, HEADS, DIM, device="cuda").to(DTYPE) for _ in range(2))
    slots = torch.randperm(2 * tokens, device="cuda")[:tokens]
    count = tokens // codec.BLOCK_TOKENS
    blocks, counts = torch.arange(count, device="cuda"), torch.full((count,), codec.BLOCK_TOKENS, device="cuda")
    print(f"{torch.cuda.get_device_name()}, {tokens} tokens of one layer; GB/s of the host's bytes, ms")
    for name in CODECS:
        layout = codec.BlockLayout(name, HEADS, DIM, DIM, DTYPE)
        arena = torch.zeros(count, layout.block_bytes, dtype=torch.uint8).pin_memory()
        near = torch.empty_like(arena, device="cuda")
        calls = {
            "copy to host": lambda a=arena, b=near: a.copy_(b, non_blocking=True),
            "encode": lambda x=layout, a=arena: triton_impl.encode(x, keys, values, slots, a, blocks, counts),
            "copy to GPU": lambda a=arena, b=near: b.copy_(a, non_blocking=True),
            "decode": lambda x=layout, a=arena: triton_impl.decode(x, a, blocks, counts, keys, values, slots),
        }
        times = {way: do_bench(call, warmup=20, rep=100, return_mode="median") for way, call in calls.items()}
        cells = (f"{way} {arena.nbytes / ms / 1e6:.1f} GB/s {ms:.3f} ms" for way, ms in times.items())
        print(f"{name:8}{arena.nbytes / 1e6:8.1f} MB  " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
