"""KEEPKV_GPU_KERNEL=triton: a layer compressed with our Triton kernels is the layer that torch compresses."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from keepkv_sglang.compress.batch import Rows, Storage, compress_rows
from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.merge import triton_impl as merge
from keepkv_sglang.kernels.score import triton_impl as score
from tests.support.layers import random_layer
from tests.support.paged import DEVICE

# Keys are near duplicates, which merge.
layer = partial(
    random_layer, 130, 8, references=24, ctx=40, dim=64, topics=6, noise=1 / 3, lv_dtype=torch.float32, device=DEVICE
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scorer", "rule"), [("window_references", "attention_matching"), ("snapkv", "mean")])
def test_it_is_what_torch_gives(scorer, rule, dtype, monkeypatch):
    x, policy = layer(dtype=dtype), SpanPolicy(m=26, merge=rule, recent=4, sinks=2, threshold=0.6, scorer=scorer)
    calls = []
    for module, name in ((score, "window_sums"), (merge, "nearest_kept"), (merge, "merge_segments")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "torch")
    wanted = compress_layer(x, policy)
    assert not calls
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    got = compress_layer(x, policy)
    assert set(calls) == {"window_sums", "nearest_kept", "merge_segments"}
    assert torch.equal(got.kept, wanted.kept) and torch.equal(got.assign, wanted.assign)
    assert (got.assign >= 0).sum() > got.kept.numel(), "nothing was merged"
    for name in ("k", "v", "lv"):
        a, b = getattr(got, name), getattr(wanted, name)
        one = 2 * torch.finfo(a.dtype).eps  # of 16-bit storage, a rounding to the other side
        # The fit solves normal equations, which makes rounding of 1e-6 a hundred times as large.
        torch.testing.assert_close(a, b, rtol=max(1e-3, one), atol=1e-4)


def test_slots_of_a_pool(monkeypatch):
    """compress_rows gathers with our kernel too, and writes what compress_layer gives."""
    x, policy = layer(dtype=torch.bfloat16), SpanPolicy(m=26, merge="mean", recent=4, sinks=2, threshold=0.6)
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = Rows(slots[:40], slots[40:170], slots[170:196])

    def pool(context, span):
        whole = span.new_zeros(256, *span.shape[1:])
        whole[rows.context], whole[rows.source] = context, span
        return whole

    values = pool(torch.zeros_like(x.v[:40]), x.v)
    storage = Storage([pool(x.k_ctx, x.k)], [values], [pool(x.lv_ctx, x.lv)], [x.scale])
    gathered = []
    function = merge.gather_slots
    monkeypatch.setattr(merge, "gather_slots", lambda *a: gathered.append(a) or function(*a))
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    (result,) = compress_rows(storage, rows, lambda _: x.q, x.q.shape[1], x.q_index, policy, 1 << 20)
    assert len(gathered) == 5  # K and votes of the context; K, V and votes of the span
    wanted = compress_layer(x, policy)
    for name, pooled in (("k", storage.keys), ("v", storage.values), ("lv", storage.log_votes)):
        got = getattr(result, name)
        assert torch.equal(got, getattr(wanted, name)) and torch.equal(pooled[0][rows.target], got)


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "cuda")
    with pytest.raises(ValueError, match="torch or triton"):
        choose.gpu_kernel()
