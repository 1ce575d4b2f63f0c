"""The merge rules and compress_layer: formulas by hand, the float64 reference, properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv_sglang.compress.layer import compress_layer, merge_from_assignment
from keepkv_sglang.compress.rules import RULES, get_rule
from keepkv_sglang.compress.rules.least_squares import _ridge
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.kernels.merge import reference
from tests.support.exact import solve
from tests.support.layers import F64, log_mass, one_cluster, permuted, policy, random_layer, tiny

MERGING = [rule for rule in RULES if rule != "evict"]
COPYING = [rule for rule in RULES if rule != "attention_matching"]
"""Rules that leave slots of one token as they are."""
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64 against float64: rounding through logs and one small solve
SINGLE = {
    "rtol": 2e-4,
    "atol": 2e-5,
}  # float32 against float64: logs of sums, then a solve of condition < 1e3


# Formulas by hand: keys 0 and 1 (D = 1), votes 2 and 1, one query q = ln 4, so s = 1, 4 and w = 2, 4

HAND = tiny([[[math.log(4)]]], [[0.0], [1.0]], [[1.0], [4.0]], [2.0, 1.0])


def test_mean_by_hand():
    k, v, votes = one_cluster(HAND, "mean")
    assert (float(k), float(v), votes) == pytest.approx((4 / 6, 18 / 6, 3.0))


def test_zip_by_hand():
    """Eq. 7: k_r = (2*0 + 4*1) ln(6/3) / (2 ln 1 + 4 ln 4); p_r exp(q k_r) = 3 * 4^(1/2) = 6 = w_e + w_c."""
    k, v, votes = one_cluster(HAND, "zip")
    assert (float(k), float(v), votes) == pytest.approx((math.log(2) / math.log(4), 3.0, 3.0))
    assert votes * math.exp(math.log(4) * float(k)) == pytest.approx(6.0)


def test_tangent_by_hand():
    """k_r = 4/6; log p_r = ln 6 - q k_r."""
    k, v, votes = one_cluster(HAND, "tangent")
    assert (float(k), float(v), votes) == pytest.approx((4 / 6, 3.0, 6 / 4 ** (4 / 6)))


def test_least_squares_by_hand():
    """r = ln 6 - ln 3 - q/1.5; delta = q r / (1.3 q^2), and r * 0.3/1.3 remains for the votes."""
    q, k_bar = math.log(4), 4 / 6
    r = math.log(6 / 3) - q * k_bar
    k, v, votes = one_cluster(HAND, "least_squares")
    assert float(k) == pytest.approx(k_bar + r / (1.3 * q))
    assert (float(v), votes) == pytest.approx((3.0, 3 * math.exp(r * 0.3 / 1.3)))


def test_tangent_weighs_queries_by_the_clusters_attention():
    """Two queries; token 2 stays outside and takes almost all of query 1's attention, so query 0 decides."""
    x = tiny([[[1.0]], [[3.0]]], [[0.0], [1.0], [9.0]], [[0.0], [0.0], [0.0]], [1.0, 1.0, 1.0])
    k, _, lv = merge_from_assignment(x, torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1]]), "tangent")
    q, z = (
        torch.tensor([1.0, 3.0], dtype=F64),
        torch.tensor([1 + math.e + math.e**9, 1 + math.e**3 + math.e**27]),
    )
    mass = 1 + q.exp()
    s_hat = torch.stack([(1 / z).mean(), (q.exp() / z).mean()])
    k_bar = s_hat[1] / s_hat.sum()
    share = (mass / z) / (mass / z).sum()
    torch.testing.assert_close(k[0, 0, 0], k_bar)
    torch.testing.assert_close(lv[0, 0], (share * (mass.log() - q * k_bar)).sum())


def test_zip_averages_over_the_window_as_eq_8():
    """s_hat = EMA with decay 0.9 and bias correction, mean over the group's heads."""
    q = [[[0.3], [0.6]], [[1.0], [2.0]]]
    x = tiny(q, [[1.0], [1.5]], [[1.0], [2.0]], [1.0, 2.0])
    s = [
        (0.9 * (math.exp(0.3 * key) + math.exp(0.6 * key)) + math.exp(key) + math.exp(2 * key)) / (2 * 1.9)
        for key in (1.0, 1.5)
    ]
    w = [s[0], 2 * s[1]]
    expected = (w[0] + 1.5 * w[1]) * math.log(sum(w) / 3) / (w[0] * math.log(s[0]) + w[1] * math.log(s[1]))
    k, v, votes = one_cluster(x, "zip")
    assert (float(k), float(v), votes) == pytest.approx((expected, (w[0] + 2 * w[1]) / sum(w), 3.0))


# Exactness at one query


@pytest.mark.parametrize("rule", ["zip", "tangent"])
def test_exact_for_the_one_query_it_is_built_on(rule):
    """Theorem 3, for a whole cluster: one query, one head, p_r exp(q.k_r scale) = sum w, same output."""
    x = replace(random_layer(n=12, heads=1, group=1, w=1), scale=0.5)
    k, v, votes = one_cluster(x, rule)
    q, logits = x.q[0, 0], x.k[:, 0] @ x.q[0, 0] * 0.5 + x.lv[:, 0]
    assert votes * float((q @ k * 0.5).exp()) == pytest.approx(float(logits.exp().sum()), rel=1e-9)
    torch.testing.assert_close(v, torch.softmax(logits, 0) @ x.v[:, 0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(2, 30))
def test_tangent_is_never_above_the_true_mass(seed, n):
    """log sum p exp(q.k) is convex in q: its tangent at the one window query lies below it elsewhere."""
    x = replace(random_layer(n=n, heads=1, group=1, w=1, seed=seed), scale=1.0)
    k, _, votes = one_cluster(x, "tangent")
    later = torch.randn(200, 8, dtype=F64, generator=torch.Generator().manual_seed(seed + 1)) * 3
    true = log_mass(later, x.k[:, 0], x.lv[:, 0])
    assert (math.log(votes) + later @ k <= true + 1e-9).all()


def test_least_squares_fits_the_window_better_than_tangent():
    """Mean squared error of the cluster's log mass at the window's queries, over 20 clusters."""
    error = {"tangent": 0.0, "least_squares": 0.0}
    for seed in range(20):
        x = random_layer(n=20, heads=1, group=3, w=8, dim=16, seed=seed)
        q = x.q.flatten(0, 1)
        true = log_mass(q, x.k[:, 0], x.lv[:, 0], x.scale)
        for rule in error:
            k, _, votes = one_cluster(x, rule)
            error[rule] += float((math.log(votes) + q @ k * x.scale - true).square().mean())
    assert error["least_squares"] < 0.95 * error["tangent"]


def test_both_forms_of_the_ridge_solve_agree():
    """Q > D solves in D dimensions, Q <= D in Q: the same delta (push-through identity)."""
    g = torch.Generator().manual_seed(0)
    for queries, dim in ((5, 9), (9, 5), (7, 7)):
        q, r = (
            torch.randn(2, queries, dim, dtype=F64, generator=g),
            torch.randn(2, 3, queries, dtype=F64, generator=g),
        )
        gram = q @ q.mT
        ridge = 0.3 * gram.diagonal(dim1=1, dim2=2).mean(1)
        system = gram + ridge[:, None, None] * torch.eye(queries, dtype=F64)
        delta, solved = _ridge(q, r)
        assert solved.all()
        torch.testing.assert_close(delta, (q.mT @ solve(system, r.mT)).mT)


def test_least_squares_falls_back_to_tangent_where_the_solve_fails(monkeypatch):
    """Head 1's factorisation is declared failed: tangent there, least squares in head 0."""
    x = random_layer()
    done = {r: compress_layer(x, policy(12, r)) for r in ("tangent", "least_squares")}
    real = torch.linalg.cholesky_ex

    def failing(a):
        factor, info = real(a)
        return factor, info + torch.tensor([0, 1])

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    mixed = compress_layer(x, policy(12, "least_squares"))
    for h, rule in enumerate(("least_squares", "tangent")):
        torch.testing.assert_close(mixed.k[:, h], done[rule].k[:, h])
        torch.testing.assert_close(mixed.lv[:, h], done[rule].lv[:, h])


# The product against the reference


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(("n", "m", "ctx"), [(17, 1, 0), (17, 5, 37), (63, 20, 0), (63, 62, 37), (200, 31, 37)])
def test_equals_reference_float64(rule, group, n, m, ctx):
    x = random_layer(n=n, group=group, ctx=ctx, seed=n + m + group, behind=n % 4)
    p = policy(m, rule)
    result = compress_layer(x, p)
    kept, assign, k, v, lv = reference.compress(x, p)
    assert torch.equal(result.kept, kept)
    assert torch.equal(result.assign, assign)
    for ours, theirs in ((result.k, k), (result.v, v), (result.lv, lv)):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ctx", [0, 37])
def test_recorded_selection_replays_in_float64(rule, dtype, ctx):
    """How the server's results are checked: its selection, merged again by the reference in float64."""
    x = random_layer(n=150, group=3, ctx=ctx, dim=60, w=11, dtype=dtype, lv_dtype=torch.float32)
    result = compress_layer(x, policy(31, rule, sinks=4, recent=8))
    again = merge_from_assignment(x, result.kept, result.assign, rule)
    for a, b in zip(again, (result.k, result.v, result.lv), strict=True):
        assert torch.equal(a, b)
    k, v, lv = reference.merge_from_assignment(x, result.kept, result.assign, rule)
    step = 2 * torch.finfo(dtype).eps  # rounding to storage
    tolerance = SINGLE if dtype == torch.float32 else {"rtol": step, "atol": step}
    assert result.k.dtype == result.v.dtype == dtype
    assert result.lv.dtype == torch.float32
    torch.testing.assert_close(result.k.double(), k, **tolerance)
    torch.testing.assert_close(result.v.double(), v, **tolerance)
    torch.testing.assert_close(result.lv.double(), lv, **SINGLE)


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(RULES), n=st.integers(2, 40), data=st.data(), group=st.integers(1, 4),
    ctx=st.sampled_from([0, 5]), threshold=st.sampled_from([-1.0, 0.3, 0.6, 0.9]), seed=st.integers(0, 9999),
    scorer=st.sampled_from(["snapkv", "keepkv"]), strong=st.sampled_from([0.0, 0.1, 0.5]),
)  # fmt: skip
def test_equals_reference_for_any_policy(rule, n, data, group, ctx, threshold, seed, scorer, strong):
    w = data.draw(st.integers(1, min(n, 6)))
    x = random_layer(n=n, group=group, w=w, ctx=ctx, seed=seed, dim=5, behind=data.draw(st.integers(0, min(2, n - w))))
    p = SpanPolicy(
        data.draw(st.integers(1, n - 1)), rule, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 5)),
        threshold, 5, strong, scorer,
    )  # fmt: skip
    result, expected = compress_layer(x, p), reference.compress(x, p)
    for ours, theirs in zip((result.kept, result.assign, result.k, result.v, result.lv), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)  # a short window's solve is ill-conditioned


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scratch", [1, 40_000, 150_000])
def test_scratch_limits_do_not_change_the_result(rule, scratch):
    """One head at a time, and tokens in blocks down to one, against everything at once."""
    x, p = random_layer(n=120, heads=3, w=16, ctx=37), policy(24, rule)
    whole, blocked = compress_layer(x, p), compress_layer(x, p, scratch)
    assert torch.equal(whole.kept, blocked.kept)
    assert torch.equal(whole.assign, blocked.assign)
    for a, b in ((whole.k, blocked.k), (whole.v, blocked.v), (whole.lv, blocked.lv)):
        torch.testing.assert_close(a, b, **EXACT)


# Invariants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("rule", COPYING)
def test_unmerged_slots_are_copied_bit_for_bit(rule, dtype):
    """Protected tokens and clusters of one member: key, value and votes exactly as stored."""
    x = replace(random_layer(n=100, dtype=dtype), lv=torch.rand(100, 2) * 3)
    result = compress_layer(x, policy(25, rule, strong_fraction=0.2))
    singles = 0
    for h in range(2):
        size = torch.bincount(result.assign[h][result.assign[h] >= 0], minlength=25)
        for c in torch.nonzero(size == 1)[:, 0].tolist():
            i, singles = int(result.kept[h, c]), singles + 1
            assert torch.equal(result.k[c, h], x.k[i, h])
            assert torch.equal(result.v[c, h], x.v[i, h])
            assert torch.equal(result.lv[c, h], x.lv[i, h])
        protected = [*range(2), *range(96, 100)]
        assert all(size[result.assign[h, i]] == 1 for i in protected)
        # The ceil(0.2 * 25) = 5 strongest kept tokens absorb nothing either.
        score = reference.snapkv_score(x, 7)[h][result.kept[h]]
        assert (size[score.topk(5).indices] == 1).all()
    assert singles >= 2 * 5
    if rule in ("mean", "tangent", "least_squares"):
        assert singles < 2 * 25


def test_evict_drops_everything_else():
    x = random_layer()
    result = compress_layer(x, policy(12, "evict"))
    assert int((result.assign >= 0).sum()) == 2 * 12
    assert torch.equal(result.lv, x.lv.gather(0, result.kept.T))


def test_votes_of_mean_are_the_tokens_they_stand_for():
    x = random_layer(n=80, votes=0.0)
    result = compress_layer(x, policy(12, "mean", threshold=-1.0))
    torch.testing.assert_close(result.lv.exp().sum(0), torch.full((2,), 80.0, dtype=F64))
    result = compress_layer(x, policy(12, "mean", threshold=0.8))
    torch.testing.assert_close(result.lv.exp().sum(0), (result.assign >= 0).sum(1).double())


@pytest.mark.parametrize("rule", MERGING)
def test_order_inside_a_cluster_does_not_matter(rule):
    """Any permutation of a cluster's members gives the same slot (queries see all tokens)."""
    x = random_layer(n=20, heads=1, w=4, sees_all=True)
    order = torch.cat((torch.tensor([0]), 1 + torch.randperm(19, generator=torch.Generator().manual_seed(1))))
    for a, b in zip(one_cluster(x, rule), one_cluster(permuted(x, order), rule), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    ("q", "first", "second", "votes"),
    [
        ([0.0, 1.0], [1.0, 0.0], [1.0, 1e-4], [1.0, 2.0, 1.0]),  # ln s = 0 and 1e-4: denominator near 0
        (
            [1.0, 0.0],
            [1.0, 0.5],
            [-1.0, 0.5],
            [1.0, 4.0, 1.0],
        ),  # w = e, 4/e: key scale ln(w/p) / mean ln s = -0.6
    ],
)
def test_zip_guard_refuses_the_whole_cluster(q, first, second, votes):
    """The kept token stays as it is and the joined one is dropped."""
    x = tiny([[q]], [first, second, [9.0, 9.0]], [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], votes)
    p = SpanPolicy(2, "zip", recent=1, sinks=0, threshold=-0.9, strong_fraction=0.0, pool_kernel=1)
    result = compress_layer(x, p)
    kept = int(result.kept[0, 0])
    assert result.assign[0].tolist() == [0 if i == kept else -1 for i in (0, 1)] + [1]
    assert torch.equal(result.k[0, 0], x.k[kept, 0])
    assert torch.equal(result.lv, x.lv[[kept, 2]])
    assert torch.equal(reference.compress(x, p)[1], result.assign)
    joined = compress_layer(x, replace(p, merge="mean"))
    assert joined.assign[0].tolist() == [0, 0, 1]  # `mean` has no guard


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("case", ["huge", "zero queries", "duplicate keys", "zero keys", "future", "context"])
def test_extreme_inputs_stay_finite(rule, dtype, case):
    """Logits up to 1e4 either way; exp of them overflows in every dtype."""
    x = random_layer(n=70, ctx=9, dtype=dtype, behind=5)
    big = 1e4 / float((x.q.double().reshape(6, 2, 3, 8) @ x.k.double().permute(1, 2, 0)).abs().max()) / x.scale
    if case == "huge":
        x = replace(x, q=x.q * big)
    elif case == "zero queries":
        x = replace(x, q=torch.zeros_like(x.q))
    elif case == "duplicate keys":
        x = replace(x, k=x.k[:1].expand_as(x.k), q=x.q * big)
    elif case == "zero keys":
        x = replace(x, k=torch.zeros_like(x.k))
    elif case == "future":  # what no query may see is far stronger than all that they see
        x = replace(x, k=torch.cat((x.k[:-5], x.k[-5:] * big)))
    else:
        x = replace(x, k_ctx=x.k_ctx * big)
    for threshold in (-1.0, 0.6):
        result = compress_layer(x, policy(15, rule, threshold=threshold, recent=0))
        for t in (result.k, result.v, result.lv):
            assert t.isfinite().all()
        assert torch.equal(result.assign.gather(1, result.kept), torch.arange(15).expand(2, -1))


@pytest.mark.parametrize("rule", MERGING)
def test_the_exact_path_for_vanishing_clusters(rule):
    """Sharp attention: whole clusters get less than float32 can hold. Their logarithms are still right."""
    x = random_layer(n=90, dtype=torch.float32, spread=60.0)
    result = compress_layer(x, policy(20, rule, threshold=0.3))
    k, v, lv = reference.merge_from_assignment(x, result.kept, result.assign, rule)
    # float32 logits of some 300 carry errors of 1e-4, and the logarithm of a mass is as large
    torch.testing.assert_close(result.k.double(), k, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(result.v.double(), v, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(result.lv.double(), lv, rtol=5e-3, atol=2e-2)


def test_inputs_are_not_mutated():
    x = random_layer(ctx=5)
    before = [t.clone() for t in (x.q, x.q_index, x.k_ctx, x.lv_ctx, x.k, x.v, x.lv)]
    for rule in RULES:
        compress_layer(x, policy(12, rule))
    after = (x.q, x.q_index, x.k_ctx, x.lv_ctx, x.k, x.v, x.lv)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_impossible_requests():
    x = random_layer(n=20)
    for bad, message in (
        ({"m": 20}, "keep 20 of 20"), ({"m": 0}, "keep 0 of 20"), ({"pool_kernel": 4}, "odd"),
        ({"strong_fraction": 1.5}, "strong_fraction"), ({"merge": "kmeans"}, "least_squares"),
        ({"scorer": "random"}, "snapkv"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            compress_layer(x, replace(policy(5, "mean"), **bad))
    with pytest.raises(ValueError, match="whole number of query heads"):
        compress_layer(replace(x, q=x.q[:, :5]), policy(5, "mean"))
    with pytest.raises(AssertionError):
        get_rule("evict")(None)
