"""kernels/merge/triton_impl.py against float64 and against the torch code it can replace."""

from __future__ import annotations

import pytest
import torch
from nearest import check_nearest
from paged import DEVICE

from keepkv_sglang.kernels.merge import torch_impl, triton_impl
from keepkv_sglang.kernels.merge.torch_impl import Segments, segment_logsumexp, segment_softmax, segment_sum

# Sums of at most 256 float32 products of size 1, or of 100 members with weights that sum to 1: rounding of a few 1e-6.
TOLERANCE = 1e-5
NAN = float("nan")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("n", "m", "dim"), [(3, 1, 64), (63, 20, 80), (500, 100, 128), (130, 40, 256)])
def test_nearest_kept(gen, n, m, dim):
    arguments, best, column = check_nearest(triton_impl.nearest_kept, gen, n, m, dim, DEVICE)
    torch_best, torch_column = torch_impl.nearest_kept(*arguments)
    assert (torch_best.cpu() - best).abs().max() < TOLERANCE
    assert (torch_column.cpu() == column).float().mean() > 0.99


def test_nearest_kept_at_the_edges(gen):
    """Ties take the lower column, also across tiles; nothing allowed: -inf and 0; a zero key: similarity 0."""
    k = torch.randn(1, 80, 64, generator=gen).to(DEVICE)
    k[0, 2] = k[0, 50] = k[0, 70] = k[0, 79]
    k[0, 78] = 0.0
    kept, dropped = torch.arange(75, device=DEVICE)[None], torch.tensor([[79, 78]], device=DEVICE)
    allowed = torch.ones(1, 75, dtype=torch.bool, device=DEVICE)
    best, column = triton_impl.nearest_kept(k, dropped, kept, allowed)
    assert column[0].tolist() == [2, 0] and abs(best[0, 0] - 1) < 1e-6 and best[0, 1] == 0
    allowed[0, 2] = False
    assert triton_impl.nearest_kept(k, dropped, kept, allowed)[1][0, 0] == 50
    best, column = triton_impl.nearest_kept(k, dropped, kept, torch.zeros_like(allowed))
    assert best.eq(-torch.inf).all() and column.eq(0).all()
    none = triton_impl.nearest_kept(k, dropped, kept[:, :0], allowed[:, :0])
    assert none[0].eq(-torch.inf).all() and none[1].eq(0).all()
    with pytest.raises(ValueError, match="float32"):
        triton_impl.nearest_kept(k.double(), dropped, kept, allowed)


def clusters(gen, n, m, dim, heads=2):
    """k, v, lv, assign: every cluster has a member, cluster 0 many, some tokens are dropped."""
    k, v = (torch.randn(heads, n, dim, generator=gen).to(DEVICE) for _ in range(2))
    lv = torch.rand(heads, n, generator=gen).to(DEVICE)
    assign = torch.randint(-1, m, (heads, n), generator=gen)
    assign[:, :m] = torch.arange(m)
    assign[:, m : n // 2] = 0
    return k, v, lv, assign.to(DEVICE)


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 64), (63, 20, 80), (200, 30, 128), (70, 9, 256)])
def test_merge_segments(gen, n, m, dim):
    k, v, lv, assign = clusters(gen, n, m, dim)
    seg = Segments.from_assignment(assign, m)
    log_w = (torch.randn(len(seg.rows), generator=gen) * 3).to(DEVICE)
    got_k, got_v, got_lv = triton_impl.merge_segments(k, v, lv, log_w, seg)
    weights = segment_softmax(log_w, seg)
    for got, x in ((got_k, k), (got_v, v)):
        plain = segment_sum(x.flatten(0, 1), seg, weights, seg.rows).view_as(got)
        assert (got - plain).abs().max() < TOLERANCE
    assert (got_lv.flatten() - segment_logsumexp(lv.flatten()[seg.rows][:, None], seg)[:, 0]).abs().max() < TOLERANCE
    for head in range(2):  # float64, cluster by cluster
        for c in range(m):
            members = torch.nonzero(assign[head] == c)[:, 0]
            w = torch.softmax(log_w.double()[(seg.cluster == head * m + c)], 0)
            assert (got_k[head, c] - w @ k[head, members].double()).abs().max() < TOLERANCE
            assert (got_v[head, c] - w @ v[head, members].double()).abs().max() < TOLERANCE
            assert abs(got_lv[head, c] - torch.logsumexp(lv[head, members].double(), 0)) < TOLERANCE


def test_merge_segments_at_the_edges(gen):
    """A single member is copied bit for bit; no members: 0, 0, -inf; weights and votes far apart or all 0."""
    k, v, lv, assign = clusters(gen, 20, 5, 64, heads=1)
    assign[assign == 3] = -1
    assign[0, 4:] = torch.where(assign[0, 4:] == 4, -1, assign[0, 4:])
    assign[0, 4] = 4
    seg = Segments.from_assignment(assign, 5)
    log_w = torch.where(seg.cluster == 0, -1e5, 80.0)
    log_w[seg.cluster == 1] = -torch.inf
    got_k, got_v, got_lv = triton_impl.merge_segments(k, v, lv, log_w, seg)
    assert torch.equal(got_k[0, 4], k[0, 4]) and torch.equal(got_v[0, 4], v[0, 4]) and got_lv[0, 4] == lv[0, 4]
    assert got_k[0, 3].eq(0).all() and got_v[0, 3].eq(0).all() and got_lv[0, 3] == -torch.inf
    assert got_k[0, 0].isfinite().all() and got_k[0, 1].isnan().all()
    assert segment_softmax(log_w, seg)[seg.cluster == 1].isnan().all()  # torch says the same
    with pytest.raises(ValueError, match="contiguous float32"):
        triton_impl.merge_segments(k.half(), v, lv, log_w, seg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gather_slots_copies_bits(gen, dtype):
    pool = torch.randn(90, 2, 3, 80, generator=gen).to(dtype).to(DEVICE)  # K and V in one buffer
    pool[7] = NAN  # bits, not numbers
    votes = torch.rand(90, 3, generator=gen).to(DEVICE)
    for n in (0, 1, 63):
        slots = torch.randint(90, (n,), generator=gen).to(DEVICE)
        k, v, lv = triton_impl.gather_slots(pool[:, 0], pool[:, 1], votes, slots)
        for got, source in ((k, pool[:, 0]), (v, pool[:, 1]), (lv, votes)):
            assert got.isnan().equal(source[slots].isnan()) and got.nan_to_num(9).equal(source[slots].nan_to_num(9))
    with pytest.raises(ValueError, match="contiguous"):
        triton_impl.gather_slots(pool[:, 0].transpose(1, 2), pool[:, 1], votes, slots)
