"""kernels/codec: sizes, error bound, partial blocks, idempotence; the reference and what runs on this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv_sglang.kernels import codec
from keepkv_sglang.kernels.codec import BlockLayout, cpp_impl, reference
from keepkv_sglang.kernels.codec.layout import CODECS, DTYPES
from tests.support.codec_case import LAYOUTS, Case, check_again, check_equal, check_error, name, same_bytes

KERNELS = [reference, cpp_impl]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=name)
coded = pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.codec != "native"], ids=name)


def test_bytes_per_token():
    """An 8B model of 32 layers, the demo model of 30 and what K and V themselves take."""
    big = {c: 32 * BlockLayout(c, 8, 128, 128, torch.bfloat16).block_bytes / 64 for c in CODECS}
    assert big == {"native": 131072, "int8": 32 * 8 * (128 + 128 + 4), "int4": 38912}
    assert 30 * BlockLayout("int4", 3, 64, 64, torch.float32).block_bytes / 64 == 6840


def test_layouts_that_cannot_be():
    for arguments, words in [
        (("int2", 1, 64, 64, torch.float32), "unknown codec"),
        (("int4", 1, 63, 64, torch.float32), "must be even"),
        (("int4", 1, 64, 63, torch.float32), "must be even"),
        (("int8", 0, 64, 64, torch.float32), "positive"),
        (("int8", 1, 64, 64, torch.float64), "not torch.float64"),
    ]:
        with pytest.raises(ValueError, match=words):
            BlockLayout(*arguments)


@layouts
def test_only_the_named_places_are_written(layout):
    """Also inside a block: what its unused places held, they hold."""
    case = Case(layout)
    for kernel in KERNELS:
        arena = case.encode(kernel)
        others = sorted(set(range(len(arena))) - set(case.blocks.tolist()))
        assert arena[others].equal(case.arena[others])
        parts, before = (reference._regions(layout, x[case.blocks]) for x in (arena, case.arena))
        for i, count in enumerate(case.counts.tolist()):
            assert all(x[i, :, count:].equal(y[i, :, count:]) for x, y in zip(parts[2:], before[2:], strict=True))
        again = case.encode(kernel)
        assert again.equal(arena)


@layouts
def test_native_keeps_bits_and_the_others_half_a_step(layout):
    case = Case(layout)
    if layout.codec != "native":
        check_error(case, reference)
        return
    case.keys[3], case.values[4] = float("nan"), float("-inf")
    arena = case.encode(codec)
    for pool, read in zip((case.keys, case.values), case.decode(codec, arena), strict=True):
        assert same_bytes(read[case.slots], pool[case.slots])


@coded
@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0])
def test_again_is_the_same(layout, offset):
    check_again(Case(layout, offset=offset), reference)


@coded
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-4])
def test_small_numbers(layout, size):
    """Where float16 loses digits, and where it has none."""
    case = Case(layout, size=size)
    check_error(case, reference), check_again(case, reference), check_equal(case, cpp_impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_largest_value_of_int8_comes_back(dtype):
    """All positive numbers of a 16-bit dtype as the largest of a token: the scale found in what is read is the same."""
    x = torch.arange(1, 0x7F80 if dtype == torch.bfloat16 else 0x7C00, dtype=torch.int16).view(dtype).float()
    scale = reference.symmetric_scale(x, dtype)
    q = (x * reference._inverse(scale)).clamp(max=127).round()
    read = (q * scale).clamp(max=torch.finfo(dtype).max).to(dtype).float()
    assert reference.symmetric_scale(read, dtype).equal(scale)
    normal = (scale > 2**-14) & (scale < 65504)
    assert q[normal].eq(127).all()


@coded
def test_what_is_not_finite_becomes_zero(layout):
    case, clean = Case(layout), Case(layout)
    for i, bad in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.keys[i::7, :, i], clean.keys[i::7, :, i] = bad, 0.0
        case.values[i::5, :, 3 + i], clean.values[i::5, :, 3 + i] = bad, 0.0
    for kernel in KERNELS:
        assert same_bytes(case.encode(kernel), clean.encode(reference))


@coded
@pytest.mark.parametrize("value", [0.0, -0.0, 0.125, -20.0])
def test_constant_vectors_come_back(layout, value):
    """int4: zero is the value, scale 0. int8: the largest value is 127 steps, exactly so with 16 bits."""
    case = Case(layout)
    case.keys.fill_(value), case.values.fill_(value)
    arena = case.encode(reference)
    for read, (_, scale) in zip(case.decode(reference, arena), case.steps(arena), strict=True):
        got = read[case.slots]
        if layout.codec == "int4":
            assert scale.eq(0).all() and got.eq(value).all()
        else:
            assert (got - value).abs().max() <= abs(value) * 2**-10
            assert value or not got.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec_name", ["int8", "int4"])
def test_beyond_float16_values_are_clipped(codec_name, dtype):
    case = Case(BlockLayout(codec_name, 1, 64, 64, dtype))
    case.keys[:, :, 5], case.values[:, :, 7] = 3e38, -3e38
    for read in case.decode(reference, case.encode(reference)):
        assert read.isfinite().all() and read.abs().max() >= 65504
    check_equal(case, cpp_impl)


def test_int4_of_float32_settles():
    """Where a step is below 2^-9 of zero a second round may move a value; ten rounds move it no further than 2^-9."""
    case = Case(BlockLayout("int4", 2, 64, 64, torch.float32), spread=1.0, offset=1000.0)
    first = pools = case.decode(reference, case.encode(reference))
    for _ in range(10):
        pools = case.decode(reference, case.encode(reference, pools))
    for a, b in zip(first, pools, strict=True):
        assert (a - b).abs().le(2**-9 * a.abs()).all()


@pytest.mark.parametrize("kernel", [codec, *KERNELS])
def test_wrong_arguments(kernel):
    case = Case(BlockLayout("int8", 2, 64, 64, torch.float32), (3, 4))
    good = dict(layout=case.layout, keys=case.keys, values=case.values, slots=case.slots, arena=case.arena)
    good |= dict(blocks=case.blocks, counts=case.counts)
    for wrong, error, words in [
        (dict(keys=case.keys[:, :1]), ValueError, "shapes"),
        (dict(values=case.values.half()), ValueError, "does not read"),
        (dict(slots=case.slots.int()), ValueError, "int64"),
        (dict(arena=case.arena.repeat(1, 2)[:, : case.layout.block_bytes]), ValueError, "contiguous"),
        (dict(counts=torch.tensor([0, 7])), ValueError, "1 to 64"),
        (dict(slots=case.slots[1:]), ValueError, "slots"),
        (dict(slots=case.slots + 9), IndexError, "slot"),
        (dict(blocks=case.blocks - 9), IndexError, "block"),
    ]:
        for call in (kernel.encode, kernel.decode):
            with pytest.raises(error, match=words):
                call(**good | wrong)
    none = torch.zeros(0, dtype=torch.int64)
    for call in (kernel.encode, kernel.decode):
        call(**good | dict(slots=none, blocks=none, counts=none))


@settings(max_examples=150, deadline=None)
@given(
    codec_name=st.sampled_from(["int8", "int4"]),
    dtype=st.sampled_from(DTYPES),
    heads=st.integers(1, 3),
    dims=st.tuples(*[st.sampled_from([16, 64, 80, 96, 128])] * 2),
    counts=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 20),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
    offset=st.sampled_from([0.0, 1.0, 50.0]),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 100.0]),
)
def test_whatever_the_pool(codec_name, dtype, heads, dims, counts, seed, spread, offset, size):
    layout = BlockLayout(codec_name, heads, *dims, dtype)
    case = Case(layout, tuple(counts), seed=seed, spread=spread, offset=offset, size=size)
    check_equal(case, cpp_impl), check_error(case, reference), check_again(case, reference)
