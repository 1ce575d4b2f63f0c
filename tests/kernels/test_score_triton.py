"""kernels/score/triton_impl.py against float64, and what the compressor makes of it."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.kernels.score import triton_impl
from tests.support.paged import DEVICE, INTERPRETED
from tests.support.window_case import TOLERANCE, Case, check, check_masked, check_scorer

# With 16-bit keys products are of TF32, queries and weights in two halves: 2^-21 of logits of size 10.
SPLIT = TOLERANCE if INTERPRETED else 5 * TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        dict(n=1, rows=1),
        dict(n=63, rows=7, context=31),
        dict(n=500, rows=96, context=1, references=60),
        dict(n=2047, rows=130, references=100, heads=1),
        dict(n=65, rows=70, context=129, dim=80, references=65),
        dict(n=120, rows=64, dim=128, dim_v=64),
        dict(n=61, rows=3, context=119, dim=256, heads=3),
        dict(n=70, rows=40, context=9, dim=256, references=30, dtype=torch.bfloat16),
        dict(n=130, rows=80, context=77, references=50, dtype=torch.bfloat16),
        dict(n=130, rows=80, context=77, references=50, dtype=torch.float16),
        dict(n=90, rows=40, context=33, dim=128, references=30, dtype=torch.bfloat16),
        dict(n=90, rows=40, context=33, dim=128, references=30, dtype=torch.float16),
        dict(n=90, rows=24, votes=30.0),
    ],
    ids=lambda x: "-".join(f"{name}={value}" for name, value in x.items()),
)
def test_against_float64(case, poisoned):
    x = Case(**case, device=DEVICE)
    check(x, triton_impl, TOLERANCE if x.k.dtype == torch.float32 else SPLIT)
    without = x.run(triton_impl, outputs=False)  # another compilation: its products may round otherwise
    assert without.output is None
    torch.testing.assert_close(without.squares, x.run(triton_impl).squares, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("masked", [-torch.inf, -1e30])
def test_masked_entries_weigh_nothing(masked, poisoned):
    check_masked(masked, triton_impl, DEVICE)


def test_what_a_query_may_not_see_can_overflow(poisoned):
    """Such tokens count in log_received alone, whose logarithm has room for them; C++ and torch have a slower path
    (Window.log_weight)."""
    x = Case(100, 4, device=DEVICE)
    x.position = torch.tensor([10, 20, 30, 40], device=DEVICE)
    x.k = x.k.contiguous()
    x.k[41:] *= 1e3
    sums = x.run(triton_impl)
    assert sums.squares[:, :, 41:].eq(0).all() and sums.squares.isfinite().all() and sums.output.isfinite().all()
    logits = torch.einsum("hqd,nhd->hnq", x.q.double().cpu(), x.k.double().cpu()) + x.lv.double().cpu().T[..., None]
    wanted = torch.logsumexp(logits - sums.log_z.double().cpu()[:, None], dim=2)
    assert wanted.max() > 1e3  # exp of it is not a number of float32
    torch.testing.assert_close(sums.log_received.double().cpu(), wanted, rtol=1e-5, atol=1e-4)


def test_a_query_that_sees_nothing_gives_nothing(poisoned):
    x = Case(5, 3, device=DEVICE)
    x.lv[:] = -torch.inf
    sums = x.run(triton_impl)
    assert sums.log_z.eq(-torch.inf).all()
    assert sums.log_received.eq(-torch.inf).all() and sums.squares.eq(0).all() and sums.output.eq(0).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_weights(rows, poisoned):
    x = Case(70, 9, device=DEVICE)
    wanted = x.run(triton_impl).squares[:rows]
    x.weights = x.weights[:rows]
    torch.testing.assert_close(x.run(triton_impl).squares, wanted, rtol=1e-4, atol=1e-7)


def test_wrong_arguments():
    x = Case(10, 2, device=DEVICE)
    for name, value, message in (
        ("q", x.q.double(), "float32 queries"),
        ("k", x.k.double(), "float32, bfloat16 or float16"),
        ("lv", x.lv[:5], "do not belong together"),
    ):
        wrong = Case(10, 2, device=DEVICE)
        setattr(wrong, name, value)
        with pytest.raises(ValueError, match=message):
            wrong.run(triton_impl)


def test_a_key_that_is_not_a_number_is_passed_on(poisoned):
    """The queries that see it have no log Z; torch's guards then refuse what is merged with it."""
    x = Case(70, 4, device=DEVICE)
    x.position = torch.tensor([10, 20, 60, 69], device=DEVICE)
    x.k[50, 0, 3] = torch.nan
    log_z = x.run(triton_impl).log_z
    assert log_z[0].isnan().tolist() == [False, False, True, True] and log_z[1].isfinite().all()


@pytest.mark.parametrize("scorer", ["rms", "window_references", "snapkv"])
def test_scorers_get_the_same_from_it_as_from_torch(scorer, monkeypatch):
    group, w, n = 3, 12, 90
    x = Case(n, w * group, context=17, device=DEVICE)
    position = torch.cat([torch.arange(n, n + 9), torch.arange(n - 3, n)]).to(DEVICE)
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    called = []
    window_sums = triton_impl.window_sums
    monkeypatch.setattr(triton_impl, "window_sums", lambda *a: called.append(1) or window_sums(*a))
    check_scorer(x, position, scorer)
    assert len(called) == 2  # references, window
