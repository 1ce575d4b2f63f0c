"""`attention_matching` by hand, what it gains and that it stays bounded. Reference: test_merging.py."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from keepkv_sglang.compress import sums
from keepkv_sglang.compress.layer import LayerInput, compress_layer, merge_from_assignment
from keepkv_sglang.compress.rules import attention_matching
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.kernels.merge import reference
from tests.support.layers import looked_at_elsewhere, output, random_layer, tiny

# 200 tokens of one kv head; every query sees every token.
layer = partial(random_layer, 200, heads=1, dim=32, sees_all=True, votes=0.0)


def test_by_hand():
    """Keys 0, ln 2, ln 4 and q = 1, so a = 1/7, 2/7, 4/7. Tokens 0 and 1 merge: key (2/3) ln 2; token 2 is dropped.
    One slot and one query: M = S after the first step, so u = 7 / 2^(2/3), and all attention is on the slot, A = 1:
    the value moves from the mean 3 by R / (1 + lambda)."""
    x = tiny([[[1.0]]], [[0.0], [math.log(2)], [math.log(4)]], [[1.0], [4.0], [-8.0]], [1.0, 1.0, 1.0])
    k_r, v_r, lv_r = merge_from_assignment(x, torch.tensor([[0]]), torch.tensor([[0, 0, -1]]), "attention_matching")
    wanted = (1 + 2 * 4 - 4 * 8) / 7
    assert float(k_r) == pytest.approx(2 / 3 * math.log(2))
    assert float(lv_r.exp()) == pytest.approx(7 / 2 ** (2 / 3))
    assert float(v_r) == pytest.approx(3 + (wanted - 3) / (1 + 0.03 + 0.001))


def test_slots_of_one_token_are_fitted_too():
    """Nothing merges, half is dropped: the kept keys stay bit for bit, votes and values take over what was dropped."""
    x = layer(48)
    r = compress_layer(x, SpanPolicy(100, "attention_matching", 16, 4, 1.0))
    assert torch.equal(r.k, x.k[:, 0][r.kept[0]][:, None])
    assert not torch.equal(r.v, x.v[:, 0][r.kept[0]][:, None])
    assert float(r.lv.exp().sum()) > 120


@pytest.mark.parametrize("ctx", [0, 60])
def test_queries_and_later_queries_come_closer(ctx):
    """Mean over 5 random layers, 10 % kept, against the same clusters merged by `mean`, and against least_squares."""
    error: dict[str, list[float]] = {}
    for seed in range(0, 50, 10):
        gen = torch.Generator().manual_seed(seed)
        x, later = layer(48, ctx=ctx, seed=gen), torch.randn(96, 32, generator=gen, dtype=torch.float64)
        for rule in ("mean", "least_squares", "attention_matching"):
            r = compress_layer(x, SpanPolicy(20, rule, 8, 4, 0.6, scorer="rms"))
            for i, q in enumerate((x.q.flatten(0, 1), later)):
                off = output(q, x, r.k, r.v, r.lv) - output(q, x, x.k, x.v, x.lv)
                error.setdefault(rule, [0.0, 0.0])[i] += float(off.norm())
    for fitted, squares, mean in zip(*(error[r] for r in ("attention_matching", "least_squares", "mean")), strict=True):
        assert fitted < squares < 1.01 * mean


@pytest.mark.parametrize("far", [3.0, 10.0, 30.0, 300.0])
def test_slots_that_nobody_looks_at_stay_small(far):
    """Both queries want tokens 5 and 6; 6 is dropped, and so is most of the rest. Filling a gap with slots of e^-far of
    the attention would take values or votes of e^far."""
    x, *args = looked_at_elsewhere(far)
    _, v, lv = merge_from_assignment(x, *args, "attention_matching")
    _, base, votes = merge_from_assignment(x, *args, "mean")
    # singular values of (A A^T + 0.001)^-1 A are at most 16; R has two rows, each at most twice the largest value
    assert float((v - base).norm()) < 16 * math.sqrt(2) * 2 * float(x.v.norm(dim=2).max())
    assert ((lv - votes).abs() <= 4.0 + 1e-12).all()


def test_protected_tokens_stay_and_the_others_make_up_for_it():
    """SpanPolicy.whole: bit for bit as they were; the result equals the float64 loops."""
    x = layer(48)
    p = SpanPolicy(60, "attention_matching", 8, 4, 0.6, scorer="rms", whole=((50, 62), (90, 100)))
    r = compress_layer(x, p)
    kept = torch.tensor([*range(50, 62), *range(90, 100)])
    assert torch.equal(r.kept[0, :22], kept)
    assert torch.equal(r.k[:22], x.k[kept]) and torch.equal(r.v[:22], x.v[kept]) and not r.lv[:22].any()
    assert (r.lv[22:] != 0).all(), "every other slot is fitted"
    for ours, theirs in zip((r.kept, r.assign, r.k, r.v, r.lv), reference.compress(x, p), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_oracle_has_the_same_constants():
    assert reference.MATCHING_WINDOW_WEIGHT == attention_matching.WINDOW_WEIGHT
    assert reference.RECENCY_HALF_LIFE == sums.RECENCY_HALF_LIFE


@pytest.mark.parametrize("references", [0, 20])
def test_the_default_equals_float64_loops(references):
    """Scorer, rule and weights of a server's default, with and without reference queries behind the span."""
    x = layer(48 - references, references=references, sees_all=False)
    p = SpanPolicy(60, "attention_matching", 8, 4, 0.6, scorer="window_references")
    alone = p if references else replace(p, scorer="rms")  # what it is without references
    for ours, theirs in zip(compressed(x, p), reference.compress(x, alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def compressed(x: LayerInput, p: SpanPolicy) -> tuple[torch.Tensor, ...]:
    r = compress_layer(x, p)
    return r.kept, r.assign, r.k, r.v, r.lv
