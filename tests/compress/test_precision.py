"""A compression multiplies in float32 whatever the process is set to, and leaves that as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from keepkv_sglang.compress.precision import exact_float32

PLACES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(params=["high", "medium", "highest"])
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("failing", [False, True])
def test_exact_inside_and_as_before_outside(chosen: str, failing: bool):
    before = [place.fp32_precision for place in PLACES]
    try:
        with exact_float32():
            assert [place.fp32_precision for place in PLACES] == ["ieee", "ieee"]
            if failing:
                raise MemoryError
    except MemoryError:
        assert failing
    assert [place.fp32_precision for place in PLACES] == before
    assert torch.get_float32_matmul_precision() == chosen
