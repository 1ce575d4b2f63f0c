"""kernels/score/cpp_impl.py against float64: what a window sees of a span, in one pass."""

from __future__ import annotations

import platform

import pytest
import torch

from keepkv_sglang.compress.sums import query_sums, recency
from keepkv_sglang.kernels import cpu_build
from keepkv_sglang.kernels.score import cpp_impl
from tests.support.threads import threads
from tests.support.window_case import Case, check, check_masked, check_scorer


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1),
        Case(63, 7, context=31),
        Case(500, 96, context=1, references=60),
        Case(2047, 130, references=100, heads=1),
        Case(501, 65, context=500, dim=80, references=65),
        Case(120, 64, dim=128, dim_v=64),
        Case(121, 3, context=119, dim=256, heads=3),
        Case(300, 200, context=77, references=150, dtype=torch.bfloat16),
        Case(90, 24, votes=30.0),
    ],
    ids=lambda x: f"{tuple(x.q.shape)}-{len(x.k)}-{len(x.k_ctx)}",
)
def test_against_float64(case, poisoned):
    check(case, cpp_impl)
    assert case.run(cpp_impl, outputs=False).output is None


@pytest.mark.parametrize("masked", [-torch.inf, -1e30])
def test_masked_entries_weigh_nothing(masked):
    check_masked(masked, cpp_impl)


def test_the_first_query_sees_one_token_only():
    """received counts what a query may not see as well; squares and outputs do not."""
    case = Case(40, 40)
    check(case, cpp_impl)
    assert case.run(cpp_impl).squares[:, :, -1].gt(0).all()


def test_bits_do_not_depend_on_threads_or_on_other_heads():
    case = Case(200, 70, context=9, heads=3)
    wanted = case.run(cpp_impl)
    with threads(1):
        alone = case.run(cpp_impl)
        last = cpp_impl.window_sums(
            case.q[2:], case.position, case.k_ctx[:, 2:], case.lv_ctx[:, 2:], case.k[:, 2:], case.v[:, 2:],
            case.lv[:, 2:], case.weights, True,
        )  # fmt: skip
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(wanted, alone, strict=True))
    assert torch.equal(last.output, wanted.output[2:]) and torch.equal(last.squares, wanted.squares[:, 2:])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_other_instruction_sets(march, tmp_path, monkeypatch):
    """The AVX2 and the portable path."""
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    function = cpu_build.load(cpu_build.build("score", march), "keepkv_score")
    function.argtypes = cpp_impl._function.argtypes
    monkeypatch.setattr(cpp_impl, "_function", function)
    check(Case(130, 70, context=33, references=40, dim=72), cpp_impl)
    check(Case(61, 5, dtype=torch.bfloat16), cpp_impl)


def test_wrong_arguments():
    case = Case(10, 2)
    with pytest.raises(ValueError, match="float32 queries"):
        cpp_impl.window_sums(case.q.double(), case.position, *[case.k_ctx, case.lv_ctx], case.k, case.v, case.lv,
                             case.weights, True)  # fmt: skip
    with pytest.raises(ValueError, match="do not belong together"):
        cpp_impl.window_sums(case.q, case.position, case.k_ctx, case.lv_ctx, case.k, case.v, case.lv[:5], case.weights,
                             True)  # fmt: skip


@pytest.mark.parametrize("references", [0, 9, 12], ids=["window", "both", "references"])
@pytest.mark.parametrize("scorer", ["rms", "window_references", "snapkv"])
def test_scorers_get_the_same_from_it_as_from_torch(scorer, references):
    group, w, n, context = 3, 12, 90, 17
    case = Case(n, w * group, context=context)
    position = torch.cat([torch.arange(n, n + references), torch.arange(n - w + references, n)])
    fast, slow = check_scorer(case, position, scorer)
    torch.testing.assert_close(fast.log_z, slow.log_z)


def test_it_is_left_alone_where_it_does_not_fit(monkeypatch):
    case = Case(30, 6)
    arguments = [case.k_ctx, case.lv_ctx, case.k, case.v, case.lv, False]
    position = torch.arange(24, 30)
    assert query_sums(case.q, position, *arguments) is not None
    assert query_sums(case.q.double(), position, *arguments) is None
    assert query_sums(case.q[:, :0], position[:0], *arguments) is None
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    assert query_sums(case.q, position, *arguments) is None


def test_recency_halves_every_four_tokens():
    weights = recency(9, 2, torch.zeros(1))
    assert weights.tolist()[::2] == pytest.approx([2 ** (-age / 4) for age in range(8, -1, -1)])
