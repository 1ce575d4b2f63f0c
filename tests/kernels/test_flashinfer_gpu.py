"""FlashInfer's decode and paged prefill with our variants, on a GPU, against float64; custom masks and votes together.

Only on a GPU (scripts/gpu_check.sh); never run by us. The first call compiles for minutes.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if importlib.util.find_spec("flashinfer") is None:  # installed, but not importable, is a failure
    pytest.skip("needs flashinfer", allow_module_level=True)

import flashinfer  # noqa: E402

from keepkv_sglang.kernels.attention.flashinfer_variants import decode_args, prefill_args  # noqa: E402
from tests.support.paged import Case  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16)
HEADS, DIM = (8, 2), 64
LENS, NEWS = [1, 63, 500, 2047], [1, 63, 17, 130]


def indices_of(case):
    """Page size 1: indptr [B + 1], indices and last page lengths, int32."""
    indptr = torch.zeros(len(case.lens) + 1, dtype=torch.int32, device="cuda")
    indptr[1:] = case.lens.cumsum(0)
    indices = torch.cat([case.slots(i) for i in range(len(case.lens))]).int()
    return indptr, indices, torch.ones(len(case.lens), dtype=torch.int32, device="cuda")


def tolerance(dtype):
    """Softmax weights and results are rounded to the storage: half a unit of 8 or 11 bits on values up to about 4."""
    return 8 * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)


def workspace():
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def clean(case):
    """The kernels read padding rows of the pool before they mask them: finite, as in SGLang's pools."""
    case.k, case.v = case.k.nan_to_num(0), case.v.nan_to_num(0)
    return case


@pytest.mark.parametrize("tensor_cores", [False, True], ids=["cuda_cores", "tensor_cores"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype, tensor_cores):
    """Made as the backend makes it: from a group of 4 on a server takes tensor cores, the prefill kernel."""
    case = clean(Case(LENS, heads=HEADS, dim=DIM, dtype=dtype))
    case.votes[case.slots(3)[100:300]] = -1e30
    args = prefill_args if tensor_cores else decode_args
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(), "NHD", backend="fa2", use_tensor_cores=tensor_cores, jit_args=args(dtype, DIM)
    )
    wrapper.plan(*indices_of(case), *HEADS, DIM, 1, q_data_type=dtype, kv_data_type=dtype)
    votes = case.votes.nan_to_num(0).contiguous()
    out = wrapper.run(case.q, (case.k[:, None], case.v[:, None]), votes, case.scale)
    assert (out.cpu().double() - case.wanted()).abs().max() < tolerance(dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_causal_and_with_a_custom_mask(dtype, masked):
    case = clean(Case(LENS, NEWS, heads=HEADS, dim=DIM, dtype=dtype))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace(), "NHD", backend="fa2", jit_args=prefill_args(dtype, DIM)
    )
    starts = torch.zeros(len(NEWS) + 1, dtype=torch.int32, device="cuda")
    starts[1:] = case.news.cumsum(0)
    masks = [causal(int(n), int(m), masked) for n, m in zip(case.lens, case.news, strict=True)]
    how = {"custom_mask": torch.cat([m.flatten() for m in masks])} if masked else {"causal": True}
    wrapper.plan(starts, *indices_of(case), *HEADS, DIM, 1, q_data_type=dtype, kv_data_type=dtype, **how)
    votes = case.votes.nan_to_num(0).contiguous()
    out = wrapper.run(case.q, (case.k[:, None], case.v[:, None]), votes, case.scale)
    assert (out.cpu().double() - by_hand(case, masks)).abs().max() < tolerance(dtype)


def causal(n: int, new: int, holes: bool) -> torch.Tensor:
    """[new, n] bool; with holes every fifth cached key is hidden from every query."""
    mask = torch.arange(n)[None] <= torch.arange(n - new, n)[:, None]
    if holes:
        mask[:, 1 : n - new : 5] = False
    return mask.cuda()


def by_hand(case, masks):
    """[tokens, q heads, D] float64 on the CPU."""
    parts, start = [], 0
    for i, mask in enumerate(masks):
        slots, new = case.slots(i).cpu(), mask.shape[0]
        k, v = (pool.cpu()[slots].double().repeat_interleave(HEADS[0] // HEADS[1], 1) for pool in (case.k, case.v))
        votes = case.votes.cpu()[slots].double().repeat_interleave(HEADS[0] // HEADS[1], 1)
        q = case.q[start : start + new].cpu().double()
        logits = torch.einsum("qhd,khd->hqk", q, k) * case.scale + votes.T[:, None]
        weights = torch.softmax(logits.masked_fill(~mask.cpu(), -torch.inf), 2)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v))
        start += new
    return torch.cat(parts)
