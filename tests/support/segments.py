"""Checks of merge_segments, for C++ and for Triton."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.kernels.merge import torch_impl
from keepkv_sglang.kernels.merge.torch_impl import Segments

# Sums of 100 float32 members with weights that sum to 1: rounding of a few 1e-6.
TOLERANCE = 1e-5


def clusters(gen, n, m, dim, device, heads=2):
    """k, v, lv, assign: every cluster has a member, cluster 0 many, some tokens are dropped."""
    k, v = (torch.randn(heads, n, dim, generator=gen).to(device) for _ in range(2))
    lv = torch.rand(heads, n, generator=gen).to(device)
    assign = torch.randint(-1, m, (heads, n), generator=gen)
    assign[:, :m] = torch.arange(m)
    assign[:, m : n // 2] = 0
    return k, v, lv, assign.to(device)


def check_segments(merge_segments, gen, n, m, dim, device="cpu"):
    """Against torch, and against float64 cluster by cluster."""
    k, v, lv, assign = clusters(gen, n, m, dim, device)
    seg = Segments.from_assignment(assign, m)
    log_w = (torch.randn(len(seg.rows), generator=gen) * 3).to(device)
    got_k, got_v, got_lv = merge_segments(k, v, lv, log_w, seg)
    for got, plain in zip((got_k, got_v, got_lv), torch_impl.merge_segments(k, v, lv, log_w, seg), strict=True):
        assert got.shape == plain.shape and (got - plain).abs().max() < TOLERANCE
    for head in range(2):
        for c in range(m):
            members = torch.nonzero(assign[head] == c)[:, 0]
            w = torch.softmax(log_w.double()[(seg.cluster == head * m + c)], 0)
            assert (got_k[head, c] - w @ k[head, members].double()).abs().max() < TOLERANCE
            assert (got_v[head, c] - w @ v[head, members].double()).abs().max() < TOLERANCE
            assert abs(got_lv[head, c] - torch.logsumexp(lv[head, members].double(), 0)) < TOLERANCE


def check_edges(merge_segments, gen, device="cpu"):
    """A single member is copied bit for bit; no members: 0, 0, -inf; weights and votes far apart or all 0."""
    k, v, lv, assign = clusters(gen, 20, 5, 64, device, heads=1)
    assign[assign == 3] = -1
    assign[0, 4:] = torch.where(assign[0, 4:] == 4, -1, assign[0, 4:])
    assign[0, 4] = 4
    seg = Segments.from_assignment(assign, 5)
    log_w = torch.where(seg.cluster == 0, -1e5, 80.0)
    log_w[seg.cluster == 1] = -torch.inf
    got_k, got_v, got_lv = merge_segments(k, v, lv, log_w, seg)
    assert torch.equal(got_k[0, 4], k[0, 4]) and torch.equal(got_v[0, 4], v[0, 4]) and got_lv[0, 4] == lv[0, 4]
    assert got_k[0, 3].eq(0).all() and got_v[0, 3].eq(0).all() and got_lv[0, 3] == -torch.inf
    assert got_k[0, 0].isfinite().all() and got_k[0, 1].isnan().all()
    plain = torch_impl.merge_segments(k, v, lv, log_w, seg)  # torch says the same
    assert plain[0][0, 1].isnan().all() and plain[0][0, 3].eq(0).all() and plain[2][0, 3] == -torch.inf
    with pytest.raises(ValueError, match="float32"):
        merge_segments(k.half(), v, lv, log_w, seg)
