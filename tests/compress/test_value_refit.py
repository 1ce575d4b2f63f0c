"""The values of `value_refit`: by hand, what they gain, and that they stay bounded. Reference: test_merging.py."""

from __future__ import annotations

import math

import pytest
import torch

from keepkv_sglang.compress.layer import LayerInput, compress_layer, merge_from_assignment
from keepkv_sglang.compress.select import SpanPolicy
from tests.support.layers import F64, looked_at_elsewhere, output, random_layer, tiny


def layer(seed: int) -> tuple[LayerInput, torch.Tensor]:
    """One kv head, and 32 later queries like the window's 16, [32 * G, D]."""
    gen = torch.Generator().manual_seed(seed)
    x = random_layer(200, 16, heads=1, dim=32, votes=0.0, seed=gen)
    return x, torch.randn(32 * 3, 32, generator=gen, dtype=F64)


def test_by_hand():
    """Keys 0, 1, 2 and q = 1; tokens 0 and 1 merge, 2 is dropped. One slot has all the attention: A = 1, so its
    value moves by R / (1 + 3 + 0.01) towards the output."""
    x = tiny([[[1.0]]], [[0.0], [1.0], [2.0]], [[1.0], [4.0], [-8.0]], [1.0, 1.0, 1.0])
    _, mine, _ = merge_from_assignment(x, torch.tensor([[0]]), torch.tensor([[0, 0, -1]]), "value_refit")
    e = math.e
    mean, wanted = (1 + 4 * e) / (1 + e), (1 + 4 * e - 8 * e**2) / (1 + e + e**2)
    assert float(mine) == pytest.approx(mean + (wanted - mean) / 4.01)


def test_window_and_later_queries_come_closer():
    """Mean over 10 random layers, against least_squares, whose keys and votes it has."""
    error = {"least_squares": [0.0, 0.0], "value_refit": [0.0, 0.0]}
    for seed in range(10):
        x, later = layer(seed)
        x_end = (x.q.flatten(0, 1), later)
        done = {rule: compress_layer(x, SpanPolicy(30, rule, 16, 4, 0.6)) for rule in error}
        for rule, r in done.items():
            for i, q in enumerate(x_end):
                error[rule][i] += float((output(q, x, r.k, r.v, r.lv) - output(q, x, x.k, x.v, x.lv)).norm())
        same = done["least_squares"]
        assert torch.equal(same.k, r.k) and torch.equal(same.lv, r.lv) and torch.equal(same.assign, r.assign)
        single = torch.bincount(r.assign[0][r.assign[0] >= 0], minlength=30) == 1
        assert torch.equal(r.v[single], same.v[single]) and not torch.equal(r.v, same.v)
    for before, after in zip(*error.values(), strict=True):
        assert after < before  # by 2.1 % at the window, 0.9 % later


@pytest.mark.parametrize("far", [3.0, 10.0, 30.0])
def test_clusters_that_nobody_looks_at_keep_small_values(far):
    """Both queries want tokens 5 and 6; 5 is kept alone, 6 is dropped, so half of the output is missing. The merged
    slots get e^-far of the attention: filling the gap with them would take values of e^far."""
    x, kept, assign = looked_at_elsewhere(far)
    _, v, _ = merge_from_assignment(x, kept, assign, "value_refit")
    _, base, _ = merge_from_assignment(x, kept, assign, "least_squares")
    # singular values of A^T (A A^T + 0.01)^-1 are at most 5; R has two rows, each at most twice the largest value
    bound = 5 * math.sqrt(2) * 2 * float(x.v.norm(dim=2).max())
    assert 0 < float((v - base).norm()) < bound
