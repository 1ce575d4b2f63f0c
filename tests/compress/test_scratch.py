"""What a compression holds at most beside the pool: docs/scaling.md, "scores and merging, scratch"."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from keepkv_sglang.compress.batch import SCRATCH_BYTES, Rows, Storage, compress_rows
from keepkv_sglang.compress.packed import compress_packed
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.peak_memory import peak_memory

HEADS, GROUP, DIM, LAYERS, QUERIES = 3, 3, 64, 2, 288
CASES = [(2_000, "uniform"), (2_000, "all"), (8_000, "uniform"), (8_000, "all"), (32_000, "all")]


def peak_bytes(n: int, heads: str) -> int:
    """Of a compression of n tokens to a fifth, as a CPU server's, in this process."""
    keys, values = ([torch.randn(n, HEADS, DIM) for _ in range(LAYERS)] for _ in "kv")
    votes = [torch.zeros(n, HEADS) for _ in range(LAYERS)]
    queries = [torch.randn(QUERIES, HEADS * GROUP, DIM) for _ in range(LAYERS)]
    index = torch.cat([torch.full((QUERIES - 32,), n - 1), torch.arange(n - 32, n)])
    rows = Rows(torch.arange(0), torch.arange(n), torch.arange(n // 5))
    policy = replace(span_policy(KeepKVConfig(enabled=True), n // 5, sinks=4), heads=heads)
    shared = (
        Storage(keys, values, votes, [DIM**-0.5] * LAYERS),
        rows,
        queries.__getitem__,
        HEADS * GROUP,
        index,
        policy,
    )
    with peak_memory() as peak:
        if heads == "uniform":
            results = compress_rows(*shared, SCRATCH_BYTES)
        else:
            results = compress_packed(*shared, 64, SCRATCH_BYTES, lambda *_: None)
        for _ in results:
            pass
    return peak.bytes


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[int, str], int]:
    """Of each case, in a process of its own: memory that was freed once is not asked for again."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True, timeout=600)
    return {(n, heads): size for n, heads, size in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_two_times_the_scratch_and_three_copies_of_a_layer(peaks: dict[tuple[int, str], int], case: tuple[int, str]):
    layer = 2 * case[0] * HEADS * DIM * 4  # K and V, float32
    assert peaks[case] <= 2 * SCRATCH_BYTES + 3 * layer
    assert peaks[case] >= layer, "it was measured"


if __name__ == "__main__":
    for n, heads in CASES:
        if (child := os.fork()) == 0:
            print(json.dumps([n, heads, peak_bytes(n, heads)]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
