"""kernels/codec/cpp_impl.py writes the reference's bits."""

from __future__ import annotations

import platform

import pytest
import torch

from keepkv_sglang.kernels import choose, codec, cpu_build
from keepkv_sglang.kernels.codec import BlockLayout, cpp_impl, reference
from tests.support.codec_case import LAYOUTS, Case, check_equal, name, same_bytes
from tests.support.threads import threads


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_the_references_bits(layout, offset):
    check_equal(Case(layout, offset=offset), cpp_impl)
    check_equal(Case(layout, (64,) * 9), cpp_impl)


@pytest.mark.parametrize("layout", LAYOUTS[::4], ids=name)
def test_pools_that_share_a_buffer(layout):
    """K and V of a token side by side: strides that are no multiple of a vector."""
    case = Case(layout)
    both = torch.cat([case.keys, case.values, case.values[..., :3]], 2)
    case.keys, case.values = both[..., : layout.k_dim], both[..., layout.k_dim : layout.k_dim + layout.v_dim]
    check_equal(case, cpp_impl)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_other_instruction_sets(march, tmp_path, monkeypatch):
    """The AVX2 and the portable path."""
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    function = cpu_build.load(cpu_build.build("codec", march), "keepkv_codec")
    function.argtypes = cpp_impl._function.argtypes
    monkeypatch.setattr(cpp_impl, "_function", function)
    for layout in LAYOUTS:
        check_equal(Case(layout), cpp_impl)
        if layout.codec != "native":
            check_equal(Case(layout, size=1e-6), cpp_impl)


def test_bits_do_not_depend_on_threads():
    case = Case(BlockLayout("int4", 3, 64, 64, torch.float32))
    wanted = case.encode(cpp_impl)
    with threads(1):
        assert same_bytes(case.encode(cpp_impl), wanted)


def test_torch_computes_what_it_does_not_read(monkeypatch):
    odd = Case(BlockLayout("int4", 2, 20, 6, torch.float32))
    assert not cpp_impl.supports(odd.layout, odd.keys, odd.values)
    assert same_bytes(odd.encode(codec), odd.encode(reference))
    with pytest.raises(ValueError, match="16, 32"):
        odd.encode(cpp_impl)
    assert choose.implementation("codec", odd.keys) is cpp_impl
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    assert choose.implementation("codec", odd.keys) is None
    case = Case(BlockLayout("int8", 2, 64, 64, torch.bfloat16))
    assert same_bytes(case.encode(codec), case.encode(cpp_impl))
