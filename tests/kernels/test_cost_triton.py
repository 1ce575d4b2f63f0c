"""What a GPU's host has to do for a compression: no wait for the GPU, and few operations. Counted in the interpreter.

With a CUDA device torch itself is asked whether anything waits.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from keepkv_sglang.compress.batch import GPU_SCRATCH_BYTES, Rows, Storage, compress_rows, layer_groups
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.kernels.merge import torch_impl
from tests.support.paged import DEVICE

# Operations that make the host wait for the GPU, or end in one that does.
WAITING = {"_local_scalar_dense", "nonzero", "bincount", "unique", "unique2", "masked_select", "is_nonzero", "equal"}
HEADS, GROUP, DIM, QUERIES, REFERENCES = 2, 2, 16, 8, 12


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    @contextmanager
    def counting(self):
        """Of a kernel only that it was started: the interpreter computes in torch."""
        start = GridExecutor.__call__

        def started(grid, *args, **kwargs):
            self.names["kernel"] += 1
            with _disable_current_modes():
                return start(grid, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(GridExecutor, "__call__", started)
            yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def compression(n, context, policy, layers=4):
    gen = torch.Generator().manual_seed(0)
    slots = torch.randperm(n + context + policy.m, generator=gen)

    def pool(*shape):
        return torch.randn(len(slots), *shape, generator=gen).to(torch.bfloat16).to(DEVICE)

    storage = Storage(
        [pool(HEADS, DIM) for _ in range(layers)], [pool(HEADS, DIM) for _ in range(layers)],
        [torch.zeros(len(slots), HEADS, device=DEVICE) for _ in range(layers)], [DIM**-0.5] * layers,
    )  # fmt: skip
    rows = Rows(*slots.to(DEVICE).split([context, n, policy.m]))
    q = torch.randn(REFERENCES + QUERIES, HEADS * GROUP, DIM, generator=gen).to(torch.bfloat16).to(DEVICE)
    index = torch.cat([torch.full((REFERENCES,), n), torch.arange(n - QUERIES, n)])

    def call(scratch=GPU_SCRATCH_BYTES):
        for _ in compress_rows(storage, rows, lambda _: q, HEADS * GROUP, index, policy, scratch):
            pass

    return call


@pytest.mark.parametrize("rule", ["attention_matching", "mean", "evict"])
@pytest.mark.parametrize("scorer", ["window_references", "rms"])
@pytest.mark.parametrize("context", [0, 30])
def test_the_host_never_waits(rule, scorer, context, monkeypatch):
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    monkeypatch.setattr(torch_impl, "known_to_host", lambda x: False)
    policy = SpanPolicy(20, rule, recent=4, sinks=2, threshold=0.3, scorer=scorer, whole=((30, 33),))
    call = compression(90, context, policy)
    call()  # compiles
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Count().counting() as count:
            call()
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not WAITING & set(count.names)


def test_operations_grow_with_groups_of_layers_not_with_tokens(monkeypatch):
    """A layer more in the same group: gathering its K, V and votes, and writing them, at most 25 operations."""
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    policy = SpanPolicy(20, "attention_matching", recent=4, sinks=2, threshold=0.3, scorer="window_references")
    counts = []
    for n, layers, scratch in ((90, 4, GPU_SCRATCH_BYTES), (180, 4, GPU_SCRATCH_BYTES), (90, 8, GPU_SCRATCH_BYTES)):
        call = compression(n, 30, policy, layers)
        with Count().counting() as count:
            call(scratch)
        counts.append(count.names.total())
    assert counts[1] == counts[0], "twice the tokens, the same operations"
    assert counts[2] - counts[0] <= 4 * 25, "more layers: only what reads and writes their storage"


@pytest.mark.parametrize(("tokens", "groups"), [(2000, 2), (8000, 5), (32000, 16)])
def test_layers_of_an_8b_at_once(tokens, groups, monkeypatch):
    """32 layers, 8 kv heads, group 4, head size 128 in 1 GiB: operations grow with these groups."""
    monkeypatch.setattr("keepkv_sglang.compress.batch.gpu_kernel_scores", lambda k: True)
    k = torch.empty(tokens, 8, 128, device="meta", dtype=torch.bfloat16)
    at = torch.empty(tokens, device="meta", dtype=torch.int64)
    storage = Storage([k] * 32, [k] * 32, [k[..., 0]] * 32, [1.0] * 32)
    found = layer_groups(storage, Rows(at[:0], at, at[:0]), 288, 32, GPU_SCRATCH_BYTES)
    assert len(found) <= groups
