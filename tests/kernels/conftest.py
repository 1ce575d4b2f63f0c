"""Triton tests (test_*_triton.py) need a process of their own: Triton reads TRITON_INTERPRET when @triton.jit runs.

test_triton_interpreter.py starts that process. By hand: TRITON_INTERPRET=1 pytest tests/kernels/test_merge_triton.py.
On a machine with a CUDA device they are collected without the variable, and run compiled.
"""

from __future__ import annotations

import os

import pytest
import torch

from keepkv_sglang.kernels import attention
from tests.support.paged import STOCK_DTYPES

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*_triton.py"]


@pytest.fixture(params=["cpp", "numba", "torch"])
def kernel(request):
    """The implementations of attention on a CPU."""
    return attention.load(request.param)


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=STOCK_DTYPES, ids=str)
def stock_dtype(request):
    """The storages of SGLang's own kernels."""
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Scratch and outputs start as NaN: what is read before it is written, or never written, is noticed."""

    def nan(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch, "empty", nan(torch.empty))
    monkeypatch.setattr(torch, "empty_like", nan(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", nan(torch.Tensor.new_empty))
