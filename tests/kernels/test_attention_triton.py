"""kernels/attention/triton_impl.py against the float64 equation, and what a tolerance would hide."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.kernels.attention import triton_impl
from tests.support.paged import (
    INTERPRETED,
    TOLERANCE,
    Case,
    check_nothing_but_out_is_written,
    check_strided_tensors,
    check_votes_count_like_copies,
)

# heads (q, kv), head_dim, dtype: GQA 1, 3, 4, 8, every head size, every storage
SHAPES = [
    ((3, 3), 80, torch.float32),
    ((6, 2), 64, torch.bfloat16),
    ((4, 1), 256, torch.float32),
    ((8, 1), 128, torch.float16),
    ((6, 2), 128, torch.float32),
]
if not INTERPRETED:  # which computes in float32 whatever the storage: only compiled are these tiles other programs
    SHAPES += [
        ((8, 2), 128, torch.bfloat16),
        ((4, 1), 256, torch.bfloat16),
        ((4, 1), 256, torch.float16),
        ((3, 3), 80, torch.float16),
    ]


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    if INTERPRETED:  # a program takes 10 ms: few splits, and all of them once
        monkeypatch.setattr(triton_impl, "_DECODE_PROGRAMS", 16)


@pytest.mark.parametrize(("heads", "dim", "dtype"), SHAPES, ids=str)
def test_decode_is_equation_6(heads, dim, dtype):
    case = Case([1, 63, 0, 500], heads=heads, dim=dim, dtype=dtype)
    out = case.run(triton_impl)
    assert case.error(out) < TOLERANCE
    assert out[2].eq(0).all()  # the request without KV


def test_decode_of_a_long_request_in_all_splits(monkeypatch):
    case = Case([2047], heads=(3, 1))
    monkeypatch.setattr(triton_impl, "_DECODE_PROGRAMS", 256)
    assert case.error(case.run(triton_impl)) < TOLERANCE


@pytest.mark.parametrize(("heads", "dim", "dtype"), SHAPES, ids=str)
def test_extend_is_equation_6(heads, dim, dtype):
    # empty prefix (1 of 1, 63 of 63), one new token, a prefix that ends inside a key block, no new token
    case = Case([1, 63, 200, 177, 0, 30], [1, 63, 1, 77, 0, 0], heads=heads, dim=dim, dtype=dtype)
    assert case.error(case.run(triton_impl)) < TOLERANCE


def test_extend_behind_a_long_prefix_and_without_causality():
    case = Case([2047, 63], [17, 63], heads=(3, 1))
    assert case.error(case.run(triton_impl)) < TOLERANCE
    assert case.error(case.run(triton_impl, causal=False), causal=False) < TOLERANCE


def test_padding_rows_of_an_extend_give_zeros():
    out = Case([40, 0, 9], [3, 2, 9]).run(triton_impl)
    assert out[3:5].eq(0).all() and out.isfinite().all()


@pytest.mark.parametrize("news", [None, [100, 17]])
def test_no_votes_and_zero_votes_are_the_same_bits(news):
    case = Case([130, 17], news)
    case.votes.zero_()
    assert case.same(case.run(triton_impl), case.run(triton_impl, votes=None))


def test_votes_count_like_copies():
    check_votes_count_like_copies(Case([40]), triton_impl)


@pytest.mark.parametrize("news", [None, [3, 2]])
def test_large_votes_dominate_and_stay_finite(news):
    case = Case([90, 300], news)
    case.votes[case.slots(1)[123]] = 1e4
    out = case.run(triton_impl)
    assert case.error(out) < TOLERANCE
    assert torch.equal(out[-1, :3], case.v[case.slots(1)[123], 0].expand(3, -1))


@pytest.mark.parametrize("masked", [float("-inf"), -1e30])
@pytest.mark.parametrize("news", [None, [20, 1]])
def test_masked_entries_weigh_exactly_nothing(masked, news):
    case = Case([300, 200], news)
    keep = case.slots(0)[::7]  # whole key blocks start masked, and one head is masked entirely
    case.votes[case.slots(0)] = masked
    case.votes[keep, :2] = 0.5
    case.votes[case.slots(1)[:130]] = masked
    out = case.run(triton_impl)
    assert case.error(out) < TOLERANCE
    assert out[:1, 6:].eq(0).all()
    hidden = case.votes <= -1e29
    moved = torch.where(hidden[:, :, None], case.v + 100, case.v)
    assert torch.equal(case.run(triton_impl, v=moved), out)


@pytest.mark.parametrize("news", [None, [40, 9]])
def test_strided_tensors(news):
    check_strided_tensors(Case([100, 9], news), triton_impl)


def test_nothing_but_out_is_written():
    check_nothing_but_out_is_written(Case([70, 40], [30, 40]), triton_impl)


def test_tensors_outside_the_contract_raise():
    case = Case([50, 20])
    with pytest.raises(ValueError, match="float32 or bfloat16 or float16"):
        case.run(triton_impl, k=case.k.double(), v=case.v.double())
    with pytest.raises(ValueError, match="contiguous"):
        case.run(triton_impl, k=case.k.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="log_votes"):
        case.run(triton_impl, votes=case.votes.double())
    with pytest.raises(ValueError, match="seq_lens"):
        case.run(triton_impl, lens=case.lens[:1])
    with pytest.raises(ValueError, match="lengths"):
        Case([5, 9], [2, 3]).run(triton_impl, news=[2, 2])
