"""kernels/codec/triton_impl.py writes the reference's bits. The interpreter cuts bfloat16 off instead of rounding, so
that dtype is for a GPU (and native)."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.kernels import codec
from keepkv_sglang.kernels.codec import BlockLayout, reference, triton_impl
from tests.support.codec_case import LAYOUTS, Case, check_equal, name, same_bytes
from tests.support.paged import DEVICE, INTERPRETED

COUNTS = (64, 17) if INTERPRETED else (64, 1, 17, 64, 2, 33)
READ = [x for x in LAYOUTS if not INTERPRETED or x.codec == "native" or x.dtype != torch.bfloat16]


@pytest.mark.parametrize("layout", READ, ids=name)
def test_the_references_bits(layout):
    check_equal(Case(layout, COUNTS, device=DEVICE), triton_impl)


@pytest.mark.parametrize("layout", [x for x in READ if x.codec != "native"][::7], ids=name)
@pytest.mark.parametrize("size", [1e-6, 100.0])
def test_small_and_broken_numbers(layout, size):
    case = Case(layout, COUNTS, size=size, device=DEVICE)
    case.keys[2], case.values[::5, :, 3], case.keys[:, 0, 1] = float("nan"), float("inf"), 0.1
    check_equal(case, triton_impl)


def test_sizes_that_are_no_powers_of_two():
    case = Case(BlockLayout("int4", 2, 20, 6, torch.float32), COUNTS, device=DEVICE)
    check_equal(case, triton_impl)
    case.keys = torch.randn(2, 20, len(case.keys), device=DEVICE).permute(2, 0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        case.encode(triton_impl)


@pytest.mark.parametrize("pinned", [False, True] if DEVICE == "cuda" else [False])
def test_an_arena_of_the_host(monkeypatch, pinned):
    """The pool is where the kernels run, the arena where memory is plenty; a GPU writes pinned memory itself."""
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    case = Case(BlockLayout("int8", 2, 64, 64, torch.float32), (64, 64), device=DEVICE)
    wanted = case.encode(reference).cpu()
    case.arena, case.blocks, case.counts = case.arena.cpu(), case.blocks.cpu(), case.counts.cpu()
    arena = case.arena.pin_memory() if pinned else case.arena
    codec.encode(case.layout, case.keys, case.values, case.slots, arena, case.blocks, case.counts)
    if pinned:
        torch.cuda.synchronize()
    assert same_bytes(arena, wanted)
    read, expected = case.decode(codec, arena), case.decode(triton_impl if DEVICE == "cpu" else codec, arena)
    assert all(same_bytes(a, b) for a, b in zip(read, expected, strict=True))
