"""kernels/score/triton_impl.py against loops in float64 and against the torch code it can replace."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE

from keepkv_sglang.kernels.score import reference, triton_impl
from keepkv_sglang.scoring.base import context_log_z, observe

# float32 logits of size 10 carry rounding of 1e-6, which exp passes on relative to scores of at most 1 and to log Z of
# about 5; a wrong mask or count is off by more than 1e-2.
TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("poisoned")


class Window:
    """w window positions, G heads each, H kv heads, n tokens; `last` positions spread over the span, the last at its
    end, as references and a window are."""

    def __init__(self, n, w, group=3, heads=2, dim=64, dtype=torch.float32, context=0):
        gen = torch.Generator().manual_seed(n + w)
        self.q = torch.randn(heads, w * group, dim, generator=gen) * dim**-0.5
        self.k = torch.randn(heads, n, dim, generator=gen)
        self.lv = torch.rand(heads, n, generator=gen) * 2
        self.position = torch.randint(n, (w,), generator=gen).sort().values
        self.position[-1] = n - 1
        self.k_ctx = torch.randn(context, heads, dim, generator=gen)
        self.lv_ctx = torch.rand(context, heads, generator=gen)
        for name, x in list(vars(self).items()):
            setattr(self, name, (x if name in ("position", "lv", "lv_ctx") else x.to(dtype)).to(DEVICE))

    def log_z_ctx(self):
        return context_log_z(self.q.float(), self.k_ctx, self.lv_ctx, 64)

    def observed(self):
        q, k = self.q.float(), self.k.float()
        return observe(q, self.position, k, k, self.lv, self.log_z_ctx(), 64)


def wanted(x, power):
    q, position = x.q.double().cpu(), x.position.cpu()
    ctx = None
    if len(x.k_ctx):
        ctx = reference.log_z(q, x.k_ctx.transpose(0, 1).cpu(), x.lv_ctx.T.cpu(), None, None)
    log_z = reference.log_z(q, x.k.cpu(), x.lv.cpu(), position, ctx)
    return log_z, reference.window_score(q, x.k.cpu(), x.lv.cpu(), position, log_z, power)


@pytest.mark.parametrize(
    ("n", "w", "group", "dim", "dtype", "context"),
    [
        (1, 1, 1, 64, torch.float32, 0),
        (63, 5, 3, 80, torch.float32, 31),
        (130, 9, 4, 128, torch.bfloat16, 0),
        (65, 3, 8, 256, torch.float16, 5),
    ],
    ids=str,
)
def test_scores_are_the_equation(n, w, group, dim, dtype, context):
    x = Window(n, w, group, dim=dim, dtype=dtype, context=context)
    start = x.log_z_ctx() if context else None
    log_z = triton_impl.log_z(x.q, x.k, x.lv, x.position, start)
    assert (log_z.cpu() - wanted(x, 1)[0]).abs().max() < TOLERANCE
    for power in (1, 2):
        score = triton_impl.window_score(x.q, x.k, x.lv, x.position, log_z, power)
        assert (score.cpu() - wanted(x, power)[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("n", [500, 2047])
def test_the_same_as_the_torch_code(n):
    """What scorers snapkv and rms compute today, a context included; k as a strided view of a pool's layout."""
    x = Window(n, 16, context=77)
    window = x.observed()
    k = x.k.transpose(0, 1).contiguous().transpose(0, 1)
    ctx = triton_impl.log_z(x.q, x.k_ctx.transpose(0, 1), x.lv_ctx.T)
    assert (ctx - x.log_z_ctx()).abs().max() < TOLERANCE
    log_z = triton_impl.log_z(x.q, k, x.lv, x.position, ctx)
    assert (log_z - window.log_z).abs().max() < TOLERANCE
    mean = triton_impl.window_score(x.q, k, x.lv, x.position, log_z)
    assert (mean - window.mean_received()).abs().max() < TOLERANCE
    rms = triton_impl.window_score(x.q, k, x.lv, x.position, log_z, power=2)
    assert (rms - window.received_norm() / window.viewers().sqrt()).abs().max() < TOLERANCE


def test_tokens_that_no_query_sees_and_masked_ones_score_zero():
    x = Window(100, 4)
    x.position = torch.tensor([10, 20, 30, 40], device=DEVICE)
    x.lv[:, 5] = float("-inf")
    x.k[:, 41:] *= 1e3  # exp of these overflows
    log_z = triton_impl.log_z(x.q, x.k, x.lv, x.position)
    for power in (1, 2):
        score = triton_impl.window_score(x.q, x.k, x.lv, x.position, log_z, power)
        assert score[:, 41:].eq(0).all() and score[:, 5].eq(0).all() and score[:, :5].gt(0).all()
        assert score.isfinite().all()


def test_nothing_seen_is_minus_infinity():
    x = Window(3, 2)
    empty = triton_impl.log_z(x.q, x.k[:, :0], x.lv[:, :0])
    assert empty.eq(float("-inf")).all()
    start = torch.ones_like(empty)
    assert torch.equal(triton_impl.log_z(x.q, x.k[:, :0], x.lv[:, :0], start=start), start)
    assert triton_impl.log_z(x.q[:, :0], x.k, x.lv).shape == (2, 0)


def test_other_shapes_are_refused():
    x = Window(9, 2)
    with pytest.raises(ValueError, match="dividing"):
        triton_impl.log_z(x.q[:, :5], x.k, x.lv, x.position)
    with pytest.raises(ValueError, match="power"):
        triton_impl.window_score(x.q, x.k, x.lv, x.position, x.lv, 3)
    with pytest.raises(ValueError, match="float32"):
        triton_impl.log_z(x.q.double(), x.k, x.lv)
    with pytest.raises(ValueError, match="log_z"):
        triton_impl.window_score(x.q, x.k, x.lv, x.position, x.lv)
