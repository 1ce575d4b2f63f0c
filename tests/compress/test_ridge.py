"""The ridge fit: exact up to its bounds, Gauss-Seidel above them; bounded memory, operations linear in the slots."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from keepkv_sglang.compress.layer import compress_layer, merge_from_assignment
from keepkv_sglang.compress.rules import ridge
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.kernels.merge import cpp_impl
from tests.support import layers
from tests.support.exact import solve
from tests.support.layers import F64, random_layer

LAMBDA = 0.03, 1e-3


def equations(m: int, queries: int, heads=2, dim=8) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries to slots, some of which everybody looks at, and a residual."""
    gen = torch.Generator().manual_seed(m + queries)
    logits = torch.randn(heads, m, queries, generator=gen, dtype=F64) + 2 * torch.randn(
        heads, m, 1, generator=gen, dtype=F64
    )
    return logits.softmax(dim=1), torch.randn(heads, queries, dim, generator=gen, dtype=F64)


def solved(a: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    power = a.square().sum(dim=(1, 2)) / a.shape[2]
    return ridge.solve(lambda slots: a[:, slots], a.shape[1], r.clone(), power, *LAMBDA)


def shifted(gram: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    power = a.square().sum(dim=(1, 2)) / a.shape[2]
    return gram + (LAMBDA[0] * power + LAMBDA[1])[:, None, None] * torch.eye(gram.shape[1], dtype=F64)


def optimum(a: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return solve(shifted(a @ a.transpose(1, 2), a), a @ r)


def loss(a: torch.Tensor, r: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """[H]: what the ridge minimises."""
    weight = LAMBDA[0] * a.square().sum(dim=(1, 2)) / a.shape[2] + LAMBDA[1]
    left = r - a.transpose(1, 2) @ delta
    return left.square().sum(dim=(1, 2)) + weight * delta.square().sum(dim=(1, 2))


@pytest.fixture
def small(monkeypatch):
    """Bounds that small examples are above."""
    for name, value in {"LARGEST": 32, "BLOCK": 16, "PART": 24}.items():
        monkeypatch.setattr(ridge, name, value)


@pytest.mark.parametrize(("m", "queries"), [(1, 1), (20, 70), (32, 700), (70, 20), (700, 32), (600, 300)])
def test_exact_where_one_of_both_is_small(m, queries, request):
    """The last one with the real bounds."""
    if m * queries < 100_000:
        request.getfixturevalue("small")
    a, r = equations(m, queries)
    delta, done = solved(a, r)
    assert done.all()
    torch.testing.assert_close(delta, optimum(a, r), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("m", "queries"), [(33, 33), (100, 50), (50, 100)])
def test_above_the_bounds_one_sweep_over_blocks(small, m, queries):
    """By loops over the equation; and it is between the values as they were and the optimum, near the latter."""
    a, r = equations(m, queries)
    wanted, left = torch.zeros(2, m, 8, dtype=F64), r.clone()
    for at in range(0, m, 16):
        b = a[:, at : at + 16]
        wanted[:, at : at + 16] = solve(shifted(b @ b.transpose(1, 2), a), b @ left)
        left = left - b.transpose(1, 2) @ wanted[:, at : at + 16]
    delta, done = solved(a, r)
    assert done.all()
    torch.testing.assert_close(delta, wanted, rtol=1e-9, atol=1e-12)
    before, best, ours = loss(a, r, delta * 0), loss(a, r, optimum(a, r)), loss(a, r, delta)
    assert (best < ours).all() and (before - ours > 0.6 * (before - best)).all()


def test_a_head_that_cannot_be_solved_is_told_and_alone(small):
    for m, queries in ((20, 70), (70, 20), (70, 50)):
        a, r = equations(m, queries)
        a[1, 3, 2] = torch.nan
        delta, done = solved(a, r)
        assert done.tolist() == [True, False]
        good, _ = solved(a[:1], r[:1])
        torch.testing.assert_close(delta[:1], good)


span = partial(random_layer, ctx=7, group=2, dim=16)


def policy(m: int, rule: str, **settings) -> SpanPolicy:
    return layers.policy(m, rule, threshold=0.3, scorer="rms", **settings)


RULES = "attention_matching", "value_refit"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n", "m", "w"), [(120, 60, 30), (120, 60, 10), (120, 20, 40)])
def test_held_or_made_anew_is_the_same(small, monkeypatch, rule, n, m, w):
    """Blocks, the queries' form and the slots' form, with whole tokens; heads together and one by one."""
    x, p = span(n, w), policy(m, rule, whole=((3, 9),))
    held = compress_layer(x, p)
    for bytes_held in (0, 8 * m * w * 2):  # nothing; one of the two heads
        monkeypatch.setattr(ridge, "HELD_BYTES", bytes_held)
        anew = compress_layer(x, p)
        for name in ("k", "v", "lv"):
            torch.testing.assert_close(getattr(anew, name), getattr(held, name), rtol=1e-9, atol=1e-10)
    assert torch.equal(held.v[:6], x.v[3:9]) and torch.equal(held.k[:6], x.k[3:9])
    assert torch.equal(held.lv[:6], x.lv[3:9])


def error(x, r) -> float:
    """Of the window queries' attention outputs from the slots, squared and summed; the values of the context are 0."""
    total = 0.0
    for h in range(x.k.shape[1]):
        q = x.q[:, 2 * h : 2 * h + 2].flatten(0, 1) * x.scale
        seen = torch.arange(len(x.k)) <= x.q_index.repeat_interleave(2)[:, None]
        context = q @ x.k_ctx[:, h].T + x.lv_ctx[:, h]
        before = (q @ x.k[:, h].T + x.lv[:, h]).masked_fill(~seen, -torch.inf)
        after = (q @ r.k[:, h].T + r.lv[:, h]).masked_fill(~seen[:, r.kept[h]], -torch.inf)
        outputs = [torch.cat((context, y), 1).softmax(1)[:, context.shape[1] :] for y in (before, after)]
        total += float((outputs[0] @ x.v[:, h] - outputs[1] @ r.v[:, h]).square().sum())
    return total


@pytest.mark.parametrize("rule", RULES)
def test_blocks_come_near_the_exact_fit(monkeypatch, rule):
    """60 slots of 120, 60 query rows a head: blocks of 16 beside one Cholesky and beside no refit."""
    x, p = span(120, 30), policy(60, rule)
    exact = compress_layer(x, p)
    for name, value in {"LARGEST": 32, "BLOCK": 16}.items():
        monkeypatch.setattr(ridge, name, value)
    blocks = compress_layer(x, p)
    none = replace(blocks, v=compress_layer(x, replace(p, merge="mean")).v)
    assert torch.equal(blocks.k, exact.k) and torch.equal(blocks.kept, exact.kept)
    torch.testing.assert_close(blocks.lv, exact.lv, rtol=1e-9, atol=1e-9)
    assert error(x, blocks) - error(x, exact) < 0.4 * (error(x, none) - error(x, exact))


@pytest.mark.parametrize("rule", ["tangent", "least_squares", "value_refit"])
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_clusters_in_parts_are_the_same(rule, spread):
    """Scratch memory for 7 tokens of one head: clusters go 7 at a time, members 7 at a time. With spread 40 sums
    underflow and logarithms are taken term by term."""
    x = span(90, 12, heads=1, seed=3, spread=spread)
    p = policy(20, rule)
    whole, parts = compress_layer(x, p), compress_layer(x, p, 7 * 2 * 24 * 8)
    assert torch.equal(whole.assign, parts.assign) and int((whole.assign >= 0).sum()) > 40
    for name in ("k", "v", "lv"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-8, atol=1e-8)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_tensor_grows_as_slots_times_queries(small, monkeypatch, rule, dtype):
    """150 and 300 slots, 200 query rows a head, 1,600 numbers may be held: no tensor is larger than the span's keys [H,
    n, D], or than some 30 tokens or slots of both heads by the queries."""
    monkeypatch.setattr(ridge, "HELD_BYTES", 8 * 1600)
    for n, m in ((300, 150), (600, 300)):
        x = span(n, 100, dtype=dtype)
        r, scratch = compress_layer(x, policy(m, "mean")), 200 * 2 * 2 * 30 * x.k.element_size()
        with Largest() as seen:
            merge_from_assignment(x, r.kept, r.assign, rule, scratch_bytes=scratch)
        assert seen.numbers <= max(2 * n * 16, 2 * 200 * 32) < 2 * m * 200


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("w", [12, 40])
def test_operations_grow_as_the_slots(small, monkeypatch, rule, w):
    """Half of n kept, n doubled: of matrix products without scores and matching, at most twice as many."""
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    counts = []
    for n in (400, 800):
        x, flops = span(n, w, heads=1), {}
        for name in (rule, "mean"):
            with FlopCounterMode(display=False) as counter:
                compress_layer(x, policy(n // 2, name))
            flops[name] = counter.get_total_flops()
        counts.append(flops[rule] - flops["mean"])
    assert 0 < counts[1] <= 2.05 * counts[0]


def test_the_one_pass_in_cpp_has_the_same_bound(monkeypatch):
    x, taken, original = span(200, 120, dtype=torch.float32), [], cpp_impl.fit
    monkeypatch.setattr(cpp_impl, "fit", lambda *a, **k: taken.append(a[0].shape[1]) or original(*a, **k))
    for m, calls in ((100, 1), (101, 1)):
        monkeypatch.setattr(ridge, "LARGEST", 100)
        compress_layer(x, policy(m, "attention_matching"))
        assert taken == [100] * calls
