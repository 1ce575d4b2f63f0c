"""compress/heads: how many tokens each head keeps, against a slow reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepkv_sglang.compress.by_head import merge_scored, score_heads
from keepkv_sglang.compress.heads import LEVELS, SHORT, Demand, get_sharing, slots_of_heads
from keepkv_sglang.compress.heads.base import in_levels
from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.registry import HEADS
from keepkv_sglang.compress.select import SpanPolicy, left_raw
from tests.support.layers import random_layer
from tests.support.threads import threads

SHARED = ("layer", "all")


def scores_of(layers, heads, n, seed=0, spread=2.0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(layers, heads, n, generator=gen, dtype=torch.float64)).exp()


def slowly(scores: torch.Tensor, mean: int, least: int, name: str) -> list[list[int]]:
    """The least of every head, then token after token the largest share that is left."""
    layers, heads, _ = scores.shape
    shares = scores / scores.sum(2, keepdim=True)
    counts = [[least] * heads for _ in range(layers)]
    groups = [[(x, h) for x in range(layers) for h in range(heads)]]
    if name == "layer":
        groups = [[(x, h) for h in range(heads)] for x in range(layers)]
    for group in groups:
        left = {(x, h): sorted(shares[x, h].tolist(), reverse=True)[least:] for x, h in group}
        for _ in range(len(group) * (mean - least)):
            x, h = max(group, key=lambda at: left[at][0] if left[at] else -1.0)
            left[x, h].pop(0)
            counts[x][h] += 1
    return counts


@given(st.sampled_from(SHARED), st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.data(), st.integers(0, 99))
def test_the_largest_shares_are_kept(name, layers, heads, n, data, seed):
    mean = data.draw(st.integers(0, n))
    least = data.draw(st.integers(0, mean))
    floor = data.draw(st.floats(0, 1))
    scores = scores_of(layers, heads, n, seed)
    demand = Demand.of(scores, mean, least, floor)
    assert demand.least == max(least, math.ceil(round(floor * mean, 9)))
    assert get_sharing(name)(demand).tolist() == slowly(scores, mean, demand.least, name)


@pytest.mark.parametrize("name", HEADS.names)
def test_sums_are_exact_and_heads_are_alike(name):
    """L H m in all, in each layer with `layer`; which number a head has says nothing about what it keeps."""
    scores, mean = scores_of(3, 5, 40), 9
    counts = get_sharing(name)(Demand.of(scores, mean, 2))
    assert counts.sum() == 3 * 5 * mean and counts.min() >= 2 and counts.max() <= 40
    if name != "all":
        assert (counts.sum(1) == 5 * mean).all()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(get_sharing(name)(Demand.of(scores[:, order], mean, 2)), counts[:, order])
    layers = torch.tensor([2, 0, 1])
    assert torch.equal(get_sharing(name)(Demand.of(scores[layers], mean, 2)), counts[layers])


def test_a_head_that_spreads_its_attention_keeps_more():
    """One head wants two tokens of ten, the other all of them alike."""
    scores = torch.full((1, 2, 10), 0.001)
    scores[0, 0, :2] = 1.0
    scores[0, 1] = 1.0
    assert get_sharing("layer")(Demand.of(scores, 5, 1, 0.0)).tolist() == [[2, 8]]


def test_a_head_that_looks_at_what_all_keep_needs_few_of_the_others():
    """Tokens 0 and 1 have a slot anyway. Among the others both heads want the same, the first hardly anything."""
    scores = torch.tensor([[[50.0, 50, 2, 1, 1, 1, 1, 1], [1.0, 1, 2, 1, 1, 1, 1, 1]]])
    rivals = torch.arange(2, 8)
    counts = get_sharing("layer")(Demand.of(scores, 3, 1, 0.0, rivals))
    assert counts.tolist() == [[1, 5]]
    assert get_sharing("layer")(Demand.of(scores[:, :, 2:], 3, 1, 0.0)).tolist() == [[3, 3]]


def test_scores_that_are_no_numbers_are_worth_nothing():
    scores = scores_of(1, 2, 6)
    scores[0, 0] = torch.tensor([math.nan, -math.inf, -1.0, 0.0, math.nan, -math.inf])
    scores[0, 1, 0] = math.inf
    demand = Demand.of(scores, 3, 1, 0.0)
    assert demand.shares.isfinite().all() and demand.shares[0, 0].sum() == 0
    assert get_sharing("all")(demand).tolist() == [[1, 5]]


@pytest.mark.parametrize(("mean", "least", "floor"), [(7, 0, 0.1), (-1, 0, 0.1), (3, 4, 0.1), (3, 1, 1.5)])
def test_what_cannot_be_met_is_refused(mean, least, floor):
    with pytest.raises(ValueError, match="not in order"):
        Demand.of(scores_of(1, 1, 6), mean, least, floor)


def layer_of_three():
    return random_layer(references=8, heads=3, group=2, spread=2.0)


POLICY = SpanPolicy(m=20, merge="attention_matching", recent=6, sinks=2, threshold=0.6, scorer="window_references")


def scores_by(x, policy):
    return torch.cat([group.scores for group in score_heads(x, policy)])


@pytest.mark.parametrize("whole", [(), ((10, 15), (40, 42))])
@pytest.mark.parametrize("name", SHARED)
def test_whole_sinks_and_recent_tokens_have_a_slot_in_every_head(name, whole):
    x = layer_of_three()
    policy = replace(POLICY, whole=whole)
    scores = torch.stack([scores_by(x, policy)] * 3)
    counts = slots_of_heads(scores, policy, name)
    heads = x.k.shape[1]
    assert sum(map(sum, counts)) == 3 * heads * policy.m
    assert len(set(counts[0])) > 1  # not uniform, or this tests nothing
    raw = left_raw(policy, 60)
    assert raw == 6
    for head, result in enumerate(merge_scored(x, policy, score_heads(x, policy), counts[0])):
        assert result.k.shape[0] == counts[0][head]
        kept = set(result.kept[0].tolist())
        assert {0, 1, *range(54, 60), *(i for a, b in whole for i in range(a, b))} <= kept
        assert result.kept[0, -raw:].tolist() == [*range(54, 60)]


def test_uniform_heads_are_those_of_a_layer():
    x = layer_of_three()
    whole = compress_layer(x, POLICY)
    counts = slots_of_heads(scores_by(x, POLICY)[None], POLICY, "uniform")
    assert counts == [[POLICY.m] * x.k.shape[1]]
    for head, result in enumerate(merge_scored(x, POLICY, score_heads(x, POLICY), counts[0])):
        torch.testing.assert_close(result.kept[0], whole.kept[head])
        torch.testing.assert_close(result.k[:, 0], whole.k[:, head], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.lv[:, 0], whole.lv[:, head], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [[10, 20, 10], [10, 10, 20], [20, 10, 10], [60, 10, 60]])
def test_heads_that_keep_equally_many_are_merged_as_each_alone(counts):
    x = layer_of_three()
    scored = score_heads(x, POLICY)
    for head, together in enumerate(merge_scored(x, POLICY, scored, counts)):
        # no two alike, so each is merged by itself
        alone = merge_scored(x, POLICY, scored, [counts[head] if h == head else 30 + h for h in range(3)])[head]
        assert torch.equal(together.kept, alone.kept) and torch.equal(together.assign, alone.assign)
        for name in ("k", "v", "lv"):  # float32 sums of another number of heads at once
            torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(1, 10))
def test_levels_are_few_and_keep_the_sum_the_order_and_the_bounds(counts, levels):
    found = in_levels(torch.tensor([counts]), levels)[0].tolist()
    assert sum(found) == sum(counts) and len(set(found)) <= 2 * levels
    assert min(counts) <= min(found) and max(found) <= max(counts)
    ranked = [count for _, count in sorted(zip(counts, found, strict=True))]
    assert ranked == sorted(ranked), "who kept more keeps no less"
    assert len(counts) > levels or found == counts


def test_a_short_spans_heads_keep_few_different_numbers():
    policy = SpanPolicy(m=60, merge="mean", recent=4, sinks=1, threshold=0.2, scorer="rms", heads="all")
    for n, few in ((SHORT - 1, True), (SHORT, False)):
        counts = torch.tensor(slots_of_heads(scores_of(6, 5, n).float(), policy, "all"))
        assert counts.sum() == 6 * 5 * 60
        assert (len(counts.unique()) <= 2 * LEVELS) == few


def test_a_head_may_keep_everything():
    x = layer_of_three()
    heads = x.k.shape[1]
    everything = merge_scored(x, POLICY, score_heads(x, POLICY), [60, *[10] * (heads - 1)])[0]
    assert torch.equal(everything.k, x.k[:, :1]) and torch.equal(everything.lv, x.lv[:, :1])
    assert everything.kept.tolist() == everything.assign.tolist() == [[*range(60)]]


def test_scores_without_a_common_measure_are_shared_out_uniformly():
    x = layer_of_three()
    policy = replace(POLICY, scorer="keydiff", merge="evict")
    assert slots_of_heads(scores_by(x, policy)[None], policy, "all") == [[20] * x.k.shape[1]]


def test_heads_on_threads_of_their_own_leave_the_number_of_threads():
    x = layer_of_three()
    with threads(2):
        scored = score_heads(x, POLICY)
        shared = merge_scored(x, POLICY, scored, [10, 20, 30])
        found = []
        begun = Thread(target=lambda: found.append(torch.get_num_threads()))
        begun.start()
        begun.join()
        assert found == [torch.get_num_threads()] == [2]
    with threads(1):
        alone = merge_scored(x, POLICY, scored, [10, 20, 30])
    for one, other in zip(shared, alone, strict=True):
        assert torch.equal(one.kept, other.kept) and torch.equal(one.assign, other.assign)
        for name in ("k", "v", "lv"):  # float64: MKL's sums depend on where in memory their operands lie
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12)
