"""The scorers of other papers against loops in float64 (kernels/score/reference.py), and formulas by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.registry import SCORERS
from keepkv_sglang.compress.scorers import get_scorer
from keepkv_sglang.compress.select import SpanPolicy, select
from keepkv_sglang.compress.window import Window, observe
from keepkv_sglang.kernels.merge import reference
from keepkv_sglang.kernels.score import reference as reference_scores
from tests.support.layers import F64, cast, random_layer, window_of

WINDOWED = ("tova", "gkv", "value_norm", "expected_attention", "keydiff", "knorm", "streaming_llm")


layer = partial(random_layer, n=40, dim=6, noise=1.0)


def test_every_scorer_has_a_reference():
    with_loops = {"snapkv", "rms", "keepkv"} | set(reference_scores.SCORES)
    others = {"snapkv", "rms", "keepkv", "h2o", "expected_attention_full", "window_references"}
    assert with_loops == set(SCORERS.names) == others | set(WINDOWED)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("ctx", "behind"), [(0, 0), (7, 3)])
def test_equals_loops_in_float64(name, group, ctx, behind):
    x = layer(group=group, ctx=ctx, behind=behind)
    expected = reference_scores.score(x, name)
    for block in (1 << 20, 7):  # blocks of 7 tokens exercise every seam
        torch.testing.assert_close(get_scorer(name)(window_of(x, block), 7), expected, rtol=1e-10, atol=1e-11)
    single = get_scorer(name)(window_of(cast(x, torch.float32)), 7)
    # float32: logits of order 10 carry errors of 1e-6
    torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=2e-5)


def test_h2o_wants_every_query():
    x = layer(n=20, w=20)
    for block in (1 << 20, 7):
        torch.testing.assert_close(get_scorer("h2o")(window_of(x, block), 7), reference_scores.score(x, "h2o"))
    result = compress_layer(x, SpanPolicy(5, "mean", 2, 1, 0.6, scorer="h2o"))
    assert result.kept.shape == (2, 5)
    for short in (layer(n=20, w=19), replace(x, q_index=torch.full((20,), 19))):
        with pytest.raises(ValueError, match=r"needs the attention of every query.*offline.*snapkv"):
            compress_layer(short, SpanPolicy(5, "mean", 2, 1, 0.6, scorer="h2o"))


def test_expected_attention_full_wants_queries_of_the_future():
    x = layer(n=20, w=16)
    y = replace(x, q_index=torch.full((16,), 19))
    for block in (1 << 20, 7):
        scores = get_scorer("expected_attention_full")(window_of(y, block), 7)
        torch.testing.assert_close(scores, reference_scores.score(y, "expected_attention_full"))
        assert (scores[:, :4] > scores[:, 4:].amax(1, keepdim=True)).all()
    for wrong in (x, layer(n=4, w=1)):
        with pytest.raises(ValueError, match=r"moved behind the span \(offline only"):
            get_scorer("expected_attention_full")(window_of(wrong), 7)


def by_hand(logits: list[list[float]], values: list[list[float]], position: list[int]) -> Window:
    """One head; logits [w, n] are what the queries give (D = w: query j is the unit vector j)."""
    k = torch.tensor(logits, dtype=F64).T[None]
    w, n = len(logits), k.shape[1]
    v = torch.tensor(values, dtype=F64)[None]
    q, none = torch.eye(w, dtype=F64)[None], torch.full((1, w), -math.inf, dtype=F64)
    return observe(q, torch.tensor(position), k, v, k.new_zeros(1, n), none, 1 << 20)


L2, L3, L5, L6 = (math.log(x) for x in (2, 3, 5, 6))
# Query 0 sees tokens 0, 1 with weights 1, 3 of 4; query 1 sees 0, 1, 2 with weights 2, 5, 3 of 10.
HAND = by_hand([[0.0, L3, 0.0], [L2, L5, L3]], [[1.0, -1.0], [3.0, 4.0], [0.0, -2.0]], [1, 2])


@pytest.mark.parametrize("ctx", [0, 7])
@pytest.mark.parametrize("references", [1, 4])
def test_window_references_equals_loops(ctx, references):
    x = layer(w=6 - references, references=references, ctx=ctx)
    expected = reference_scores.score(x, "window_references")
    for block in (1 << 20, 7):
        torch.testing.assert_close(get_scorer("window_references")(window_of(x, block), 7), expected)


def test_window_references_with_one_kind_of_query_is_rms():
    for position in (torch.arange(34, 40), torch.arange(40, 46)):
        window = window_of(replace(layer(), q_index=position))
        assert torch.equal(get_scorer("window_references")(window, 7), get_scorer("rms")(window, 7))


def test_window_references_by_hand():
    """Unpooled. The references give 2/8, 1/8, 5/8. The window's older query wants token 0, the newer token 1: their
    squares stand 2^(-1/4) to 1; both are weighed twice, and token 2 is behind them."""
    hand = by_hand([[L2, 0.0, L5], [0.0, -40.0, 0.0], [-40.0, 0.0, 0.0]], [[1.0]] * 3, [3, 1, 1])
    old = 2 ** (-1 / 8)
    expected = torch.tensor([[2 * old / (1 + old), 2 / (1 + old), 5 / 8]], dtype=F64)
    torch.testing.assert_close(get_scorer("window_references")(hand, 1), expected)


def test_tova_by_hand():
    torch.testing.assert_close(get_scorer("tova")(HAND, 1), torch.tensor([[0.2, 0.5, 0.3]], dtype=F64))


def test_gkv_by_hand():
    """Query 0: 1/3, 1 of the largest; decayed 0.8/3, 0.8. Query 1: 2/5, 1, 3/5."""
    expected = torch.tensor([[max(0.8 / 3, 0.4), 1.0, 0.6]], dtype=F64).log()
    torch.testing.assert_close(get_scorer("gkv")(HAND, 1), expected)
    early = by_hand([[L6, 0.0], [0.0, L5]], [[1.0], [1.0]], [1, 1])  # what the older query wanted decays once
    torch.testing.assert_close(get_scorer("gkv")(early, 1).exp(), torch.tensor([[0.8, 1.0]], dtype=F64))


def test_value_norm_by_hand():
    expected = torch.tensor([[2 * (0.25 + 0.2) / 2, 7 * (0.75 + 0.5) / 2, 2 * 0.3]], dtype=F64)
    torch.testing.assert_close(get_scorer("value_norm")(HAND, 1), expected)


def test_expected_attention_by_hand():
    """Mean and variance of two logits a, b: (a + b) / 2 and ((a - b) / 2)^2."""
    pairs, norms = [(0.0, L2), (L3, L5), (0.0, L3)], [math.sqrt(2), 5.0, 2.0]
    raw = [math.exp((a + b) / 2 + ((a - b) / 2) ** 2 / 2) for a, b in pairs]
    expected = [math.log(n * r / sum(raw)) for r, n in zip(raw, norms, strict=True)]
    torch.testing.assert_close(get_scorer("expected_attention")(HAND, 1), torch.tensor([expected], dtype=F64))


def test_streaming_llm_keeps_sinks_and_the_latest():
    x = layer(n=30)
    result = compress_layer(x, SpanPolicy(8, "evict", 2, 3, 0.6, scorer="streaming_llm"))
    assert result.kept.tolist() == [[0, 1, 2, 25, 26, 27, 28, 29]] * 2


@pytest.mark.parametrize("name", ["tova", "gkv"])
def test_what_nobody_sees_is_marked(name):
    scores = get_scorer(name)(window_of(layer(behind=4)), 7)
    assert (scores[:, -4:] == -math.inf).all() and scores[:, :-4].isfinite().all()


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("spread", [0.0, 1e3])
def test_extreme_logits_give_no_nan(name, spread):
    """Queries of zeros, and logits of some thousands: sharper than float32's exp can hold."""
    x = layer(dtype=torch.float32, spread=spread, behind=2)
    scores = get_scorer(name)(window_of(x), 7)
    assert not scores.isnan().any() and (scores < math.inf).all()
    assert not get_scorer(name)(window_of(replace(x, v=torch.zeros_like(x.v))), 7).isnan().any()


# Chunks (ChunkKV)


def test_chunks_are_kept_whole():
    scores = torch.tensor([[0.0, 9.0, 0.0, 4.0, 4.0, 4.0, 8.0, 0.0, 0.0, 5.0]])  # means of three: 3, 4, 2.67, 5
    p = SpanPolicy(4, "evict", 0, 0, 0.6, strong_fraction=0.0, chunk=3)
    for m, kept in ((1, [9]), (4, [3, 4, 5, 9]), (6, [0, 1, 3, 4, 5, 9]), (8, [0, 1, 2, 3, 4, 5, 6, 9])):
        x = selected(scores, replace(p, m=m))
        assert x == [kept], m  # the chunk that no longer fits gives its first tokens
    assert selected(scores, replace(p, recent=2, sinks=1)) == [[0, 3, 8, 9]]  # by token, as without chunks
    unseen = torch.tensor([[1.0, 1.0, 5.0, -math.inf, -math.inf, -math.inf]])
    assert selected(unseen, replace(p, m=3, chunk=2)) == [[0, 2, 3]]


def selected(scores: torch.Tensor, p: SpanPolicy) -> list[list[int]]:
    ours, theirs = select(scores, p), reference.select(scores, p)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    return ours[0].tolist()


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("n", [16, 40, 41])
def test_chunks_equal_reference(chunk, n):
    x = layer(n=n)
    for m in (1, 7, n - 1):
        p = SpanPolicy(m, "mean", 4, 2, 0.6, chunk=chunk)
        ours, theirs = compress_layer(x, p), reference.compress(x, p)
        assert torch.equal(ours.kept, theirs[0]) and torch.equal(ours.assign, theirs[1])
        torch.testing.assert_close(ours.k, theirs[2])
    with pytest.raises(ValueError, match="chunk 0"):
        compress_layer(x, SpanPolicy(7, "mean", 4, 2, 0.6, chunk=0))
