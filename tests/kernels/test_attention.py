"""kernels/attention: every implementation against the float64 equation, and what tolerances would hide."""

from __future__ import annotations

import logging
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from keepkv_sglang.kernels import attention
from tests.support import paged
from tests.support.paged import (
    TOLERANCE,
    check_nothing_but_out_is_written,
    check_strided_tensors,
    check_votes_count_like_copies,
)
from tests.support.threads import threads

Case = partial(paged.Case, device="cpu")
LENGTHS = [1, 63, 500, 0, 2047]


@pytest.fixture
def cpp():
    return attention.load("cpp")


@pytest.fixture(autouse=True)
def _threads():
    with threads(1):  # tiny tensors: threads would only wait for each other
        yield


SHAPES = [((9, 3), 64), ((4, 4), 80), ((8, 1), 128), ((4, 1), 256), ((6, 2), 72)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_decode_is_equation_6(kernel, heads, dim, dtype):
    case = Case(LENGTHS, heads=heads, dim=dim, dtype=dtype)
    assert case.error(case.run(kernel)) < TOLERANCE
    assert case.run(kernel)[3].eq(0).all()  # the request without KV


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_extend_is_equation_6(kernel, heads, dim, dtype):
    # empty prefix (1 of 1, 63 of 63), one new token, a prefix that ends inside a key block, no new token
    case = Case([1, 63, 500, 900, 0, 130], [1, 63, 1, 77, 0, 0], heads=heads, dim=dim, dtype=dtype)
    assert case.error(case.run(kernel)) < TOLERANCE


def test_extend_without_causality_is_equation_6(kernel):
    case = Case([1, 63, 500], [1, 63, 77])
    assert case.error(case.run(kernel, causal=False), causal=False) < TOLERANCE


def test_padding_rows_of_an_extend_give_zeros(kernel):
    case = Case([40, 0, 9], [3, 2, 9])
    out = case.run(kernel)
    assert out[3:5].eq(0).all() and out.isfinite().all()


def test_large_votes_dominate_and_stay_finite(kernel):
    case = Case([300, 2047])
    case.votes[case.slots(1)[1234]] = 1e4
    assert case.error(case.run(kernel)) < TOLERANCE
    assert torch.equal(case.run(kernel)[1, :3], case.v[case.slots(1)[1234], 0].expand(3, -1))


def test_votes_count_like_copies(kernel):
    check_votes_count_like_copies(Case([40]), kernel)


@pytest.mark.parametrize("masked", [float("-inf"), -1e30])
@pytest.mark.parametrize("news", [None, [20, 1]])
def test_masked_entries(kernel, masked, news):
    case = Case([700, 300], news)
    keep = case.slots(0)[::7]  # whole key blocks start masked, and one head is masked entirely
    case.votes[case.slots(0)] = masked
    case.votes[keep, :2] = 0.5
    case.votes[case.slots(1)[:257]] = masked
    assert case.error(case.run(kernel)) < TOLERANCE
    assert case.run(kernel)[:1, 6:].eq(0).all()


@pytest.mark.parametrize("news", [None, [100, 17, 1]])
def test_no_votes_and_zero_votes_are_the_same_bits(kernel, news):
    case = Case([400, 17, 2000], news)
    case.votes.zero_()
    assert torch.equal(case.run(kernel), case.run(kernel, votes=None))


def test_zero_votes_are_plain_attention(kernel):
    """Against torch's SDPA: an independent implementation of the equation's special case."""
    case = Case([333], [333])
    case.votes.zero_()
    slots = case.slots(0)
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k[slots], case.v[slots]))
    plain = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (case.run(kernel) - plain[0].transpose(0, 1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("news", [None, [40, 500, 9]])
def test_strided_tensors(kernel, news):
    case = Case([300, 500, 9], news)
    check_strided_tensors(case, kernel)
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.run(kernel, q=transposed), case.run(kernel))


def test_nothing_but_out_is_written(kernel):
    check_nothing_but_out_is_written(Case([300, 40], [30, 40]), kernel)


@pytest.mark.parametrize("news", [None, [5, 70, 200, 1]])
def test_cpp_bits_do_not_depend_on_neighbours_slots_or_threads(cpp, news):
    lens = [5, 700, 2047, 256]
    case = Case(lens, news)
    whole = case.run(cpp)
    torch.set_num_threads(2)
    assert torch.equal(case.run(cpp), whole)
    moved = torch.randperm(case.k.shape[0])  # slot s moves to moved[s]
    k, v, votes = (torch.empty_like(x).index_copy_(0, moved, x) for x in (case.k, case.v, case.votes))
    table = torch.where(case.table >= 0, moved[case.table.clamp_min(0).long()], -7).int()
    assert torch.equal(case.run(cpp, k=k, v=v, votes=votes, table=table), whole)
    start = 0
    for i, n in enumerate(news or [1] * len(lens)):
        alone = {"rows": case.rows[i : i + 1], "lens": case.lens[i : i + 1]}
        if news:
            alone["news"] = case.news[i : i + 1]
        assert torch.equal(case.run(cpp, q=case.q[start : start + n], **alone), whole[start : start + n])
        start += n


def test_cpp_bits_do_not_depend_on_chunks(cpp):
    """A prompt in two chunks equals the prompt at once: rows are computed alike however they are batched."""
    case = Case([600], [600])
    whole = case.run(cpp)
    first = case.run(cpp, q=case.q[:333], lens=torch.tensor([333]), news=torch.tensor([333]))
    second = case.run(cpp, q=case.q[333:], news=torch.tensor([267]))
    assert torch.equal(torch.cat([first, second]), whole)


def test_cpp_exp_is_accurate(cpp):
    """Two keys, logits 0 and -x: the output is exp(-x) / (1 + exp(-x)), from 0 to past the underflow."""
    x = torch.cat([torch.linspace(0, 88, 3001), torch.tensor([1e3, 1e20])])
    n = len(x)
    k = torch.zeros(2 * n, 1, 8)
    v = torch.tensor([0.0, 1.0]).repeat(n)[:, None, None].repeat(1, 1, 8)
    votes = torch.stack([torch.zeros(n), -x], dim=1).view(2 * n, 1)
    table = torch.arange(2 * n, dtype=torch.int32).view(n, 2)
    out = torch.empty(n, 1, 8)
    cpp.decode(torch.zeros(n, 1, 8), k, v, votes, table, torch.arange(n), torch.full((n,), 2), 1.0, out)
    wanted = torch.sigmoid(-x.double())
    relative = ((out[:, 0, 0].double() - wanted) / wanted)[x < 87]
    assert relative.abs().max() < 4e-7  # exp, one addition, one reciprocal and one product in float32
    assert out[0].eq(0.5).all() and out[-2:].eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.full((9, 99), 10**6, dtype=torch.int32)}, "slot"),
        ({"rows": torch.tensor([77, 0])}, "rows"),
        ({"lens": torch.tensor([10**5, 3])}, "seq_lens"),
    ],
)
@pytest.mark.parametrize("news", [None, [2, 2]])
def test_indices_outside_the_pool_raise(kernel, change, message, news):
    if kernel.name == "torch" and message == "slot":
        message = "out of range"  # index_select's own words
    with pytest.raises(IndexError, match=message):
        Case([50, 20], news).run(kernel, **change)


def test_tensors_outside_the_contract_raise(kernel):
    case = Case([50, 20])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        case.run(kernel, k=case.k.half(), v=case.v.half())
    with pytest.raises(ValueError, match="contiguous"):
        case.run(kernel, k=case.k.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="log_votes"):
        case.run(kernel, votes=case.votes.double())
    with pytest.raises(ValueError, match="head_dim"):
        Case([5], dim=60).run(kernel)
    with pytest.raises(ValueError, match="lengths"):
        Case([5, 9], [2, 3]).run(kernel, news=torch.tensor([2, 2]))


def test_load(monkeypatch, caplog):
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    assert attention.load().name == "torch"
    assert attention.load("cpp").name == "cpp"
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "cuda")
    with pytest.raises(ValueError, match="KEEPKV_CPU_KERNEL"):
        attention.load()
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "auto")
    monkeypatch.setattr(attention, "_reported", set())
    for module in ("cpp_impl", "numba_impl"):
        monkeypatch.setitem(sys.modules, f"{attention.__name__}.{module}", None)  # import raises ImportError
    with caplog.at_level(logging.WARNING, logger="keepkv"):
        assert attention.load().name == attention.load().name == "torch"
    assert len(caplog.records) == 2  # one per fallback, once
    with pytest.raises(RuntimeError, match="KEEPKV_CPU_KERNEL=auto"):
        attention.load("cpp")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize(("march", "builders"), [("x86-64-v3", 2), ("x86-64", 1)])
def test_other_instruction_sets_built_in_a_race(march, builders, tmp_path, monkeypatch):
    """The AVX2 and the portable path; the first compiled twice at once into one empty cache: one library
    stays."""
    from keepkv_sglang.kernels import cpu_build
    from keepkv_sglang.kernels.attention import cpp_impl

    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_build, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in cpu_build.FLAGS))
    with ThreadPoolExecutor(builders) as pool:
        paths = set(pool.map(cpu_build.build, ["attention"] * builders, [march] * builders))
    assert set((tmp_path / "kernels").iterdir()) == paths
    function = cpu_build.load(paths.pop(), "keepkv_attention")
    function.argtypes = cpp_impl._function.argtypes
    monkeypatch.setattr(cpp_impl, "_function", function)
    for dtype in (torch.float32, torch.bfloat16):
        for case in (Case(LENGTHS, dim=72, dtype=dtype), Case([300, 9], [100, 9], dim=72, dtype=dtype)):
            assert case.error(case.run(cpp_impl)) < TOLERANCE
