"""Compression without queries: scorers of keys alone, the rules that go with them, and pseudo queries."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from keepkv_sglang.compress.layer import compress_layer, merge_from_assignment
from keepkv_sglang.compress.queries.pseudo import PseudoQueries, calibration_rows
from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.compress.rules import QUERY_FREE, RULES
from keepkv_sglang.compress.scorers import QUERY_AGNOSTIC, get_scorer
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.memory.calibration import CALIBRATION
from tests.support import layers
from tests.support.layers import F64, assert_same_slots, cast, permuted, random_layer, window_of
from tests.support.rotary import rope, table

SCORERS = sorted(QUERY_AGNOSTIC - {"streaming_llm"})  # that one reads nothing at all: test_registry.py


# A span without queries.
cold_layer = partial(random_layer, w=0)


def policy(m: int, merge: str = "mean", **changes) -> SpanPolicy:
    return layers.policy(m, merge, **{"scorer": "keydiff", **changes})


# Formulas, one token at a time, in Python floats


def raw_keydiff(keys: list[list[float]]) -> list[float]:
    norms = [math.sqrt(sum(c * c for c in key)) for key in keys]
    anchor = [
        sum(key[c] / norm for key, norm in zip(keys, norms, strict=True)) / len(keys) for c in range(len(keys[0]))
    ]
    length = math.sqrt(sum(c * c for c in anchor))
    dots = [sum(a * b for a, b in zip(key, anchor, strict=True)) for key in keys]
    return [-dot / (norm * length) for dot, norm in zip(dots, norms, strict=True)]


def raw_knorm(keys: list[list[float]]) -> list[float]:
    return [-math.sqrt(sum(c * c for c in key)) for key in keys]


RAW = {"keydiff": raw_keydiff, "knorm": raw_knorm}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_scores_by_the_formula(scorer, n):
    x = cold_layer(n=n, dim=6)
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 2e-6)):
        scores = get_scorer(scorer)(window_of(cast(x, dtype)), 7)
        assert scores.dtype == dtype
        for h in range(2):
            expected = torch.tensor(RAW[scorer](x.k[:, h].tolist()), dtype=F64)
            torch.testing.assert_close(scores[h].double(), expected, rtol=tolerance, atol=tolerance)


def test_keydiff_by_hand():
    """Unit keys at 0, 0 and 90 degrees: the anchor is (2, 1) / 3, and only directions count."""
    k = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 0.2]], dtype=F64)[:, None]
    x = replace(cold_layer(n=3, heads=1, dim=2), k=k)
    expected = torch.tensor([[-2.0, -2.0, -1.0]], dtype=F64) / math.sqrt(5)
    torch.testing.assert_close(get_scorer("keydiff")(window_of(x), 1), expected)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_finite_for_zero_and_opposite_keys(scorer):
    x = cold_layer(n=6)
    for k in (torch.zeros_like(x.k), torch.cat((x.k[:3], -x.k[:3]))):  # the second has no mean direction
        assert get_scorer(scorer)(window_of(replace(x, k=k)), 3).isfinite().all()


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("rule", sorted(QUERY_FREE))
def test_a_permutation_of_tokens_permutes_the_result(scorer, rule):
    """Without sinks and recent tokens nothing depends on the order."""
    x = cold_layer(n=30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    p = policy(9, rule, recent=0, sinks=0, scorer=scorer)
    assert_same_slots(compress_layer(x, p), compress_layer(permuted(x, order), p), order)


@pytest.mark.parametrize("scorer", SCORERS)
def test_heads_do_not_see_each_other(scorer):
    x = cold_layer(heads=4)
    order = torch.tensor([2, 0, 3, 1])
    y = replace(x, k=x.k[:, order], v=x.v[:, order], lv=x.lv[:, order])
    a, b = compress_layer(x, policy(12, scorer=scorer)), compress_layer(y, policy(12, scorer=scorer))
    assert torch.equal(a.kept[order], b.kept)
    torch.testing.assert_close(a.k[:, order], b.k)
    whole, alone = compress_layer(x, policy(12, scorer=scorer)), compress_layer(x, policy(12, scorer=scorer), 1)
    assert torch.equal(whole.assign, alone.assign)  # one head at a time


@pytest.mark.parametrize("scorer", SCORERS)
def test_equal_keys_keep_the_lower_tokens(scorer):
    x = cold_layer(n=12)
    x = replace(x, k=x.k[:1].expand(12, -1, -1).contiguous())
    p = policy(4, "evict", recent=0, sinks=0, scorer=scorer)
    assert compress_layer(x, p).kept.tolist() == [[0, 1, 2, 3]] * 2


# Merging without queries


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_mean_weighs_by_votes(scorer, dtype):
    """k_r = sum p k / sum p, the same for values, p_r = sum p; single tokens bit for bit."""
    x = cold_layer(dtype=dtype, ctx=5)
    r = compress_layer(x, policy(15, scorer=scorer))
    merged = 0
    for h in range(2):
        for c, i in enumerate(r.kept[h].tolist()):
            members = torch.nonzero(r.assign[h] == c)[:, 0]
            if len(members) == 1:
                assert torch.equal(r.k[c, h], x.k[i, h])
                assert torch.equal(r.lv[c, h], x.lv[i, h])
                continue
            merged += 1
            p = x.lv[members, h].double().exp()
            step = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            for ours, theirs in ((r.k, x.k), (r.v, x.v)):
                expected = (p[:, None] * theirs[members, h].double()).sum(0) / p.sum()
                torch.testing.assert_close(ours[c, h].double(), expected, rtol=step, atol=step)
            torch.testing.assert_close(r.lv[c, h].double(), p.sum().log(), rtol=step, atol=step)
    assert merged > 4
    again = merge_from_assignment(x, r.kept, r.assign, "mean")
    assert all(torch.equal(a, b) for a, b in zip(again, (r.k, r.v, r.lv), strict=True))


def test_mean_equals_zero_queries_mean():
    """Queries of zeros see all tokens alike: s_hat_i is constant, so w = p in both."""
    x = cold_layer()
    y = replace(x, q=torch.zeros(4, 6, 8, dtype=F64), q_index=torch.full((4,), 59))
    for a, b in zip(
        vars(compress_layer(x, policy(15))).values(), vars(compress_layer(y, policy(15))).values(), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_shortest_span():
    x = cold_layer(n=2)
    r = compress_layer(x, policy(1, recent=0, sinks=0, threshold=-1.0, strong_fraction=0.0))
    assert r.assign.tolist() == [[0, 0]] * 2
    with pytest.raises(ValueError, match="keep 1 of 1"):
        compress_layer(cold_layer(n=1), policy(1))


def test_what_needs_queries_says_so():
    x = cold_layer()
    for scorer in ("snapkv", "keepkv"):
        with pytest.raises(ValueError, match=f"{scorer}.* needs window queries.*keydiff"):
            compress_layer(x, policy(12, scorer=scorer))
    for rule in set(RULES) - QUERY_FREE:
        with pytest.raises(ValueError, match=f"{rule}.* needs window queries.*evict, mean"):
            compress_layer(x, policy(12, rule))
        r = compress_layer(x, policy(12))
        with pytest.raises(ValueError, match="needs window queries"):
            merge_from_assignment(x, r.kept, r.assign, rule)
    with pytest.raises(ValueError, match="query heads"):
        compress_layer(replace(x, q=torch.zeros(0, 3, 8, dtype=F64)), policy(12))


def test_agnostic_scorers_also_work_with_queries():
    """Selection by keys, merging by the queries that are there."""
    x = cold_layer()
    y = replace(x, q=torch.randn(4, 6, 8, dtype=F64), q_index=torch.full((4,), 59))
    for rule in RULES:
        assert torch.equal(compress_layer(y, policy(12, rule)).kept, compress_layer(x, policy(12)).kept)


# Pseudo queries


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("dim", "rotated"), [(8, 8), (10, 6)])
@pytest.mark.parametrize("end", [0, 3, 190])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_pseudo_queries_are_the_raw_ones_at_the_new_position(neox, dim, rotated, end, factor):
    """Forwards and backwards; a factor on the table (YaRN) is applied once, not twice."""
    raw = torch.randn(2, 5, 3, dim, dtype=F64, generator=torch.Generator().manual_seed(end))
    position = torch.tensor([4, 7, 30, 31, 90])

    def placed(layer: int, where: list[int]) -> torch.Tensor:
        rows = [rope(raw[layer, j], t, rotated, neox) for j, t in enumerate(where)]
        scaled = torch.stack(rows)
        scaled[..., :rotated] *= factor
        return scaled

    q = torch.stack([placed(layer, position.tolist()) for layer in range(2)])
    pseudo = PseudoQueries(q, position, Rotary(table(200, rotated, factor), neox))
    for layer in range(2):
        expected = placed(layer, list(range(end, end + 5)))
        torch.testing.assert_close(pseudo.behind(layer, end), expected, rtol=1e-9, atol=1e-9)


def test_pseudo_queries_of_16_bit_models():
    """Stored in bfloat16, moved in float32, rounded once; staying in place changes nothing."""
    q = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    pseudo = PseudoQueries(q, torch.arange(10, 14), Rotary(table(64, 8).float()))
    assert torch.equal(pseudo.behind(0, 10), q[0])
    assert pseudo.behind(0, 40).dtype == torch.bfloat16
    past = PseudoQueries(q, torch.full((4,), 63), Rotary(table(64, 8).float()))
    assert torch.equal(past.behind(0, 1000), q[0])  # the table's last position


def test_pseudo_queries_compress_like_any_window():
    """A span without a request, scored and merged by the default policy; the same twice."""
    x = cold_layer(n=80, dtype=torch.float32)
    q = torch.randn(1, 6, 6, 8, generator=torch.Generator().manual_seed(0))
    pseudo = PseudoQueries(q, torch.tensor(calibration_rows(60, 6)), Rotary(table(400, 8).float()))
    y = replace(x, q=pseudo.behind(0, 80), q_index=torch.full((6,), 79))
    p = policy(16, "least_squares", scorer="snapkv")
    a, b = compress_layer(y, p), compress_layer(y, p)
    assert int((a.assign >= 0).sum()) > 2 * 16
    assert all(torch.equal(s, t) for s, t in zip(vars(a).values(), vars(b).values(), strict=True))


def test_calibration_rows():
    assert calibration_rows(36, 32) == list(range(4, 36))
    rows = calibration_rows(452, 32)
    assert rows[0] == 4
    assert rows[-1] < 452
    assert set(torch.tensor(rows).diff().tolist()) == {14}
    with pytest.raises(ValueError, match="at least 36"):
        calibration_rows(35, 32)
    assert len(CALIBRATION.split()) > 260  # windows of up to MAX_WINDOW queries
