"""kernels/merge/triton_impl.py against float64 and against the torch code it can replace."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.kernels.merge import torch_impl, triton_impl
from tests.support.nearest import check_nearest, check_nearest_edges
from tests.support.paged import DEVICE
from tests.support.segments import check_edges, check_segments

# Sums of at most 256 float32 products of size 1: rounding of a few 1e-6.
TOLERANCE = 1e-5
NAN = float("nan")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("n", "m", "dim"), [(3, 1, 64), (63, 20, 80), (500, 100, 128), (130, 40, 256)])
def test_nearest_kept(gen, n, m, dim):
    arguments, best, column = check_nearest(triton_impl.nearest_kept, gen, n, m, dim, DEVICE)
    torch_best, torch_column = torch_impl.nearest_kept(*arguments)
    assert (torch_best.cpu() - best).abs().max() < TOLERANCE
    assert (torch_column.cpu() == column).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("within", [7, 50, 100, 300, 500, 9999])
def test_nearest_kept_inside_blocks(gen, within, dtype):
    """Products of 16-bit keys are exact: the same tolerance."""
    check_nearest(triton_impl.nearest_kept, gen, 300, 90, 64, DEVICE, within, dtype)


def test_nearest_kept_at_the_edges(gen):
    """Keys of 64 ones and minus ones have norm 8, so that every product is exact: the interpreter's NumPy may round
    equal columns of other keys differently."""
    check_nearest_edges(triton_impl.nearest_kept, torch.randn(1, 80, 64, generator=gen).sign().to(DEVICE))


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 64), (63, 20, 80), (200, 30, 128), (70, 9, 256)])
def test_merge_segments(gen, n, m, dim):
    check_segments(triton_impl.merge_segments, gen, n, m, dim, DEVICE)


def test_merge_segments_at_the_edges(gen):
    check_edges(triton_impl.merge_segments, gen, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gather_slots_copies_bits(gen, dtype):
    pool = torch.randn(90, 2, 3, 80, generator=gen).to(dtype).to(DEVICE)  # K and V in one buffer
    pool[7] = NAN  # bits, not numbers
    votes = torch.rand(90, 3, generator=gen).to(DEVICE)
    for n in (0, 1, 63, 600):
        slots = torch.randint(90, (n,), generator=gen).to(DEVICE)
        for source in (pool[:, 0], pool[:, 1], votes):
            got = source.new_empty(3, n, *source.shape[2:])
            triton_impl.gather_slots(source, slots, got)
            wanted = source[slots].transpose(0, 1)
            assert got.isnan().equal(wanted.isnan()) and got.nan_to_num(9).equal(wanted.nan_to_num(9))
    with pytest.raises(ValueError, match="contiguous"):
        triton_impl.gather_slots(pool[:, 0].transpose(1, 2), slots, torch.empty(80, 600, 3))
    with pytest.raises(ValueError, match="expected \\[heads, slots"):
        triton_impl.gather_slots(votes, slots, torch.empty(600, 3, device=DEVICE).T)
