"""What a window sees of a span, window_sums of kernels/score, for the tests of C++ and of Triton."""

from __future__ import annotations

from dataclasses import replace

import torch

from keepkv_sglang.compress.scorers import get_scorer
from keepkv_sglang.compress.sums import query_sums
from keepkv_sglang.compress.window import context_log_z, observe

# Logits of size 10 in float32 carry rounding of 1e-6, which exp passes on relative to attention, at most 1; sums of
# 2,000 of them carry some more. A wrong mask, weight or head is off by more than 1e-2.
TOLERANCE = 2e-5
NAMES = ("log_z", "log_z_ctx", "received", "squares", "output")


class Case:
    """H kv heads, Q rows of which the first `references` see everything, n tokens behind c others."""

    def __init__(
        self, n, rows, context=0, heads=2, dim=64, dim_v=None, references=0, dtype=torch.float32, votes=1.0,
        device="cpu",
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(n + rows + context + dim)
        dim_v = dim_v or dim
        self.q = torch.randn(heads, rows, dim, generator=gen) * 2 * dim**-0.5
        behind = torch.full((references,), n + 3)
        self.position = torch.cat([behind, (torch.arange(rows - references) + n - rows + references).clamp(min=0)])
        self.k_ctx = torch.randn(context, heads, dim, generator=gen).to(dtype)
        self.k = torch.randn(n, heads + 1, dim, generator=gen).to(dtype)
        self.v = torch.randn(heads, n, dim_v, generator=gen).to(dtype).transpose(0, 1)
        self.lv_ctx = torch.rand(context, heads, generator=gen) * votes
        self.lv = torch.rand(n, heads, generator=gen) * votes
        self.weights = torch.rand(2, rows, generator=gen)
        for name, x in list(vars(self).items()):
            setattr(self, name, x.to(device))
        # Not contiguous, as a slice of several layers' heads is. On the device: .to() would pack a slice.
        self.k = self.k[:, :heads]

    def run(self, impl, outputs=True):
        return impl.window_sums(
            self.q, self.position, self.k_ctx, self.lv_ctx, self.k, self.v, self.lv, self.weights, outputs
        )

    def exact(self):
        q, k_ctx, lv_ctx, k, v, lv, weights = (
            x.double().cpu() for x in (self.q, self.k_ctx, self.lv_ctx, self.k, self.v, self.lv, self.weights)
        )
        seen = torch.arange(k.shape[0])[:, None] <= self.position.cpu()
        logits = torch.einsum("hqd,nhd->hnq", q, k) + lv.T[..., None]
        before = torch.logsumexp(torch.einsum("hqd,chd->hcq", q, k_ctx) + lv_ctx.T[..., None], dim=1)
        log_z = torch.logaddexp(before, torch.logsumexp(logits.masked_fill(~seen, -torch.inf), dim=1))
        a = (logits - log_z[:, None]).exp()
        visible = a * seen
        squares = torch.einsum("hnq,rq->rhn", visible.square(), weights)
        return log_z, before, a.sum(2), squares, torch.einsum("hnq,nhd->hqd", visible, v)


def received(sums):
    """[H, n], of an implementation that gives it or its logarithm."""
    return sums.log_received.exp() if sums.received is None else sums.received


def check(case, impl, tolerance=TOLERANCE):
    sums = case.run(impl)
    found = (sums.log_z, sums.log_z_ctx, received(sums), sums.squares, sums.output)
    for name, got, wanted in zip(NAMES, found, case.exact(), strict=True):
        got = got.cpu()
        assert got.shape == wanted.shape and got.dtype == torch.float32, name
        same = got.double() == wanted  # -inf without a context
        # log Z and outputs are of size 1 to 10; sums of small weights are measured by their own size
        size = wanted.abs() + (1.0 if name in ("log_z", "log_z_ctx", "output") else float(wanted.abs().mean()))
        wrong = torch.where(same, 0.0, (got - wanted).abs() / size)
        assert wrong.max() < tolerance, (name, float(wrong.max()))


def check_masked(masked, impl, device="cpu"):
    """Tokens whose log votes are `masked` weigh nothing."""
    case = Case(100, 12, context=20, device=device)
    case.lv[10:30] = masked
    case.lv_ctx[:5] = masked
    check(case, impl)
    assert received(case.run(impl))[:, 10:30].eq(0).all()


def check_scorer(case, position, scorer):
    """A scorer says the same of the window as a kernel finds it and as torch does; returns both windows."""
    k, v, lv = case.k.transpose(0, 1).contiguous(), case.v.transpose(0, 1).contiguous(), case.lv.T.contiguous()
    slow = observe(case.q, position, k, v, lv, context_log_z(case.q, case.k_ctx, case.lv_ctx, 64), 64)
    sums = query_sums(case.q, position, case.k_ctx, case.lv_ctx, case.k, case.v, case.lv, True)
    assert sums is not None
    fast = replace(slow, log_z=sums.log_z, log_z_ctx=sums.log_z_ctx, whole=None, sums=sums)
    torch.testing.assert_close(fast.log_weight(), slow.log_weight(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(get_scorer(scorer)(fast, 7), get_scorer(scorer)(slow, 7), rtol=1e-4, atol=1e-7)
    return fast, slow
