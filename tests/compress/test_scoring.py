"""Scores, selection and matching: hand-computed cases, the reference, and properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.registry import MERGE_RULES
from keepkv_sglang.compress.scorers import get_scorer
from keepkv_sglang.compress.select import SpanPolicy, match, select
from keepkv_sglang.kernels.merge import reference, torch_impl
from keepkv_sglang.kernels.merge.torch_impl import (
    Segments,
    nearest_kept,
    segment_logsumexp,
    segment_softmax,
    segment_sum,
)
from tests.support import layers
from tests.support.layers import random_layer, tiny, window_of


def policy(m: int, merge: str = "evict", **changes) -> SpanPolicy:
    return layers.policy(m, merge, **{"recent": 0, "sinks": 0, **changes})


# Scores


def test_snapkv_by_hand():
    """One head, D = 1, keys are the logits: query 0 sees tokens 0..1, query 1 sees 0..2."""
    k = [[0.0], [math.log(3.0)], [math.log(4.0)]]
    x = tiny([[[1.0]], [[1.0]]], k, k, [2.0, 1.0, 1.0], seen=[1, 2])
    # weights p e^l: 2, 3, 4; Z = 5 and 9. Token 2 is seen by one query only.
    raw = torch.tensor([(2 / 5 + 2 / 9) / 2, (3 / 5 + 3 / 9) / 2, 4 / 9], dtype=torch.float64)
    torch.testing.assert_close(get_scorer("snapkv")(window_of(x), 1)[0], raw)
    pooled = torch.stack([raw[:2].mean(), raw.mean(), raw[1:].mean()])  # the edges average what exists
    torch.testing.assert_close(get_scorer("snapkv")(window_of(x), 3)[0], pooled)


def test_keepkv_by_hand():
    """Two queries of age 1 and 0: EMA weights 0.9 and 1, normalised; votes multiply."""
    k = [[0.5], [1.0], [1.5]]
    x = tiny([[[1.0]], [[2.0]]], k, k, [3.0, 1.0, 1.0], seen=[0, 1])
    s0 = (0.9 * math.exp(0.5) + math.exp(1.0)) / 1.9
    expected = torch.tensor([math.log(3 * s0), 2.0, -math.inf], dtype=torch.float64)  # nobody sees token 2
    torch.testing.assert_close(get_scorer("keepkv")(window_of(x), 7)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("ctx", [0, 37])
@pytest.mark.parametrize("behind", [0, 3])
def test_scores_equal_reference(dtype, group, ctx, behind):
    x = random_layer(group=group, ctx=ctx, dtype=dtype, behind=behind)
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    for block in (1 << 20, 7):  # blocks of 7 tokens exercise every seam
        window = window_of(x, block)
        snap, keep = get_scorer("snapkv")(window, 7), get_scorer("keepkv")(window, 7)
        torch.testing.assert_close(snap.double(), reference.snapkv_score(x, 7), **tolerance)
        torch.testing.assert_close(keep.double(), reference.keepkv_score(x), **tolerance)


def test_received_attention_is_a_distribution():
    """Summed over the span, each query has given exactly 1, without a context."""
    window = window_of(random_layer())
    queries = torch.full((2,), float(window.q.shape[1]), dtype=torch.float64)
    torch.testing.assert_close(window.received().sum(1), queries)


def test_future_keys_do_not_change_scores_of_what_is_seen():
    x = random_layer(behind=10)
    changed = x.k.clone()
    changed[-10:] *= 50
    y = replace(x, k=changed)
    for name in ("snapkv", "keepkv"):
        a, b = get_scorer(name)(window_of(x), 1), get_scorer(name)(window_of(y), 1)
        assert torch.equal(a[:, :-10], b[:, :-10])


def test_unknown_scorer():
    with pytest.raises(ValueError, match="snapkv, rms, window_references, keepkv"):
        get_scorer("random")


# Selection


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 5.0, 1.0, 1.0, 5.0, 1.0], [0.0] * 6])
    kept, absorbs = select(scores, policy(3, strong_fraction=0.3))
    assert kept.tolist() == [[0, 1, 4], [0, 1, 2]]
    assert absorbs.tolist() == [
        [True, False, True],
        [False, True, True],
    ]  # ceil(0.9) = 1 strong, the lower one


def test_sinks_and_recent_shrink_inside_m():
    scores = torch.arange(20.0).flip(0)[None]
    kept, absorbs = select(scores, policy(5, recent=10, sinks=10))
    assert kept.tolist() == [[0, 1, 2, 18, 19]]  # recent at most m // 2, sinks what is left
    assert not absorbs.any()
    kept, _ = select(scores, policy(1, recent=10, sinks=10))
    assert kept.tolist() == [[0]]  # m // 2 = 0 recent


def test_strong_fraction_is_not_rounded_up_by_floating_point():
    """0.1 * 70 is 7.000000000000001; seven tokens are protected, not eight."""
    _, absorbs = select(torch.rand(1, 200), policy(70))
    assert int((~absorbs).sum()) == 7


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 60), data=st.data(), recent=st.integers(0, 40), sinks=st.integers(0, 40),
    strong=st.floats(0, 1), levels=st.integers(1, 5), seed=st.integers(0, 999),
)  # fmt: skip
def test_select_equals_reference(n, data, recent, sinks, strong, levels, seed):
    """Few score levels, so that ties are everywhere."""
    m = data.draw(st.integers(1, n - 1))
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, n), generator=g).double()
    p = policy(m, recent=recent, sinks=sinks, strong_fraction=strong)
    for ours, theirs in zip(select(scores, p), reference.select(scores, p), strict=True):
        assert torch.equal(ours, theirs)


# Matching


def test_threshold_is_exclusive_and_direction_only_matters():
    """Kept: 0 and 1, the axes. 2 is at exactly 0.6; 3 points to token 1; 4 does, but is tiny; 5 is zero."""
    rows = [[1, 0], [0, 2.0], [0.6, -0.8], [0.1, 1], [0.001, 0.01], [0, 0]]
    k = torch.tensor([rows], dtype=torch.float64)
    kept, absorbs = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    own = torch.tensor([[0, 1, -1, -1, -1, -1]])
    p = policy(2, "mean", threshold=0.6, strong_fraction=0.0)
    assert match(k, kept, absorbs, own, p, 1 << 20).tolist() == [[0, 1, -1, 1, 1, -1]]
    all_of_them = policy(2, "mean", threshold=-1.0, strong_fraction=0.0)
    assert match(k, kept, absorbs, own, all_of_them, 1 << 20).tolist() == [[0, 1, 0, 1, 1, 0]]


def test_duplicate_keys_join_the_lower_cluster():
    k = torch.ones(1, 6, 4)
    p = policy(3, "mean", strong_fraction=0.0)
    own = torch.tensor([[0, -1, 1, -1, 2, -1]])
    kept, absorbs = torch.tensor([[0, 2, 4]]), torch.tensor([[False, True, True]])
    assert match(k, kept, absorbs, own, p, 1 << 20).tolist() == [[0, 1, 1, 1, 2, 1]]


def test_nothing_may_absorb():
    best, _ = nearest_kept(torch.randn(2, 9, 4), torch.zeros(2, 3).long(), torch.ones(2, 2).long(),
                           torch.zeros(2, 2).bool())  # fmt: skip
    assert (best == -torch.inf).all()
    x = random_layer(n=20)
    everything_protected = compress_layer(x, policy(4, "mean", threshold=-1.0, strong_fraction=1.0))
    assert int((everything_protected.assign >= 0).sum()) == 2 * 4


@pytest.mark.parametrize("scratch", [1, 3000, 64 << 20])
def test_nearest_kept_blocks_do_not_matter(scratch):
    g = torch.Generator().manual_seed(0)
    k = torch.randn(3, 80, 8, generator=g, dtype=torch.float64)
    dropped = torch.arange(20, 80).expand(3, -1)
    kept, allowed = torch.arange(20).expand(3, -1), torch.rand(3, 20, generator=g) > 0.3
    best, column = nearest_kept(k, dropped, kept, allowed, scratch_bytes=scratch)
    cosine = torch.cosine_similarity(k[:, 20:, None], k[:, None, :20], dim=-1)
    expected = cosine.masked_fill(~allowed[:, None, :], -torch.inf).max(2)
    torch.testing.assert_close(best, expected.values)
    assert torch.equal(column, expected.indices)


# Segment operations


@pytest.mark.parametrize("rule", sorted(MERGE_RULES.names))
def test_members_that_nobody_has_counted(rule, monkeypatch):
    """On a GPU the members are followed by the dropped tokens; nothing adds them up."""
    x, p = random_layer(n=60), policy(12, rule, threshold=0.7)
    wanted = compress_layer(x, p)
    assert (wanted.assign < 0).any(), "nothing was dropped"
    assert rule == "evict" or (wanted.assign >= 0).sum() > wanted.kept.numel(), "nothing was merged"
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    torch_alone = compress_layer(x, p)
    monkeypatch.setattr(torch_impl, "known_to_host", lambda x: False)
    got = compress_layer(x, p)
    for name in ("kept", "assign", "k", "v", "lv"):
        assert torch.equal(getattr(got, name), getattr(torch_alone, name)), name


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), m=st.integers(1, 12), heads=st.integers(1, 3), spread=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_segment_operations(n, m, heads, spread, seed):
    """Against one loop per cluster; with empty clusters, and with values whose exp overflows."""
    g = torch.Generator().manual_seed(seed)
    assign = torch.randint(-1, m, (heads, n), generator=g)
    assign[0, 0] = 0  # at least one member
    x = torch.randn(heads, n, 3, generator=g, dtype=torch.float64) * spread
    seg = Segments.from_assignment(assign, m)
    rows = x.flatten(0, 1)
    total = segment_sum(rows, seg, None, seg.rows).view(heads, m, 3)
    lse = segment_logsumexp(rows[seg.rows], seg).view(heads, m, 3)
    weight = segment_softmax(rows[seg.rows, 0], seg)
    assert torch.equal(seg.counts, torch.bincount(seg.cluster, minlength=heads * m))
    for h in range(heads):
        for c in range(m):
            mine = x[h][assign[h] == c]
            torch.testing.assert_close(total[h, c], mine.sum(0), rtol=1e-10, atol=1e-9)
            if len(mine):
                torch.testing.assert_close(lse[h, c], torch.logsumexp(mine, 0), rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(
                    weight[seg.cluster == h * m + c], torch.softmax(mine[:, 0], 0), rtol=1e-9, atol=1e-12
                )
