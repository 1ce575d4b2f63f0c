"""KEEPKV_GPU_KERNEL=triton: a layer compressed with our Triton kernels is the layer that torch compresses."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE

from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.merge import triton_impl as merge
from keepkv_sglang.kernels.score import triton_impl as score
from keepkv_sglang.layer_compress import LayerInput, compress_layer
from keepkv_sglang.selection import SpanPolicy


def layer(n=130, context=40, heads=2, group=3, dim=64, references=24, window=8):
    gen = torch.Generator().manual_seed(n)
    rows = references + window

    def randn(*shape):
        return torch.randn(*shape, generator=gen).to(DEVICE)

    index = torch.cat([torch.full((references,), n), torch.arange(n - window, n)]).to(DEVICE)
    topics = randn(6, heads, dim)[torch.randint(6, (n,), generator=gen).to(DEVICE)]  # near duplicates, which merge
    return LayerInput(
        q=randn(rows, heads * group, dim), q_index=index, k_ctx=randn(context, heads, dim),
        lv_ctx=randn(context, heads).abs(), k=topics + randn(n, heads, dim) / 3, v=randn(n, heads, dim),
        lv=randn(n, heads).abs(), scale=dim**-0.5,
    )  # fmt: skip


@pytest.mark.parametrize(("scorer", "rule"), [("window_references", "attention_matching"), ("snapkv", "mean")])
def test_it_is_what_torch_gives(scorer, rule, monkeypatch):
    x, policy = layer(), SpanPolicy(m=26, merge=rule, recent=4, sinks=2, threshold=0.6, scorer=scorer)
    calls = []
    for module, name in ((score, "window_sums"), (merge, "nearest_kept"), (merge, "weighted_means")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    wanted = compress_layer(x, policy)
    assert not calls
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    got = compress_layer(x, policy)
    assert set(calls) == {"window_sums", "nearest_kept", "weighted_means"}
    assert torch.equal(got.kept, wanted.kept) and torch.equal(got.assign, wanted.assign)
    assert (got.assign >= 0).sum() > got.kept.numel(), "nothing was merged"
    for name in ("k", "v", "lv"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-3, atol=1e-4)


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "cuda")
    with pytest.raises(ValueError, match="torch or triton"):
        choose.gpu_kernel()
