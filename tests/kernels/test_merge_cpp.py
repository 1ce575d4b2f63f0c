"""kernels/merge/cpp_impl.py: matching against float64, and the fit of attention_matching against torch in float64."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import partial

import pytest
import torch

from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.kernels import cpu_build
from keepkv_sglang.kernels.merge import cpp_impl, torch_impl
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from tests.support.layers import cast, random_layer
from tests.support.nearest import check_nearest, check_nearest_edges
from tests.support.segments import check_edges, check_segments, clusters
from tests.support.threads import threads

TOLERANCE = 1e-5  # float32 sums of at most 256 products of size 1


@pytest.mark.parametrize(("n", "m", "dim"), [(3, 1, 64), (63, 20, 80), (500, 100, 128), (130, 64, 256)])
def test_nearest_kept(gen, n, m, dim, poisoned):
    check_nearest(cpp_impl.nearest_kept, gen, n, m, dim)


@pytest.mark.parametrize("within", [7, 50, 100, 300, 500, 9999])
@pytest.mark.parametrize("implementation", [cpp_impl, torch_impl])
def test_nearest_kept_inside_blocks(gen, within, implementation):
    check_nearest(implementation.nearest_kept, gen, 300, 90, 64, within=within)


def test_nearest_kept_at_the_edges(gen):
    check_nearest_edges(cpp_impl.nearest_kept, torch.randn(1, 80, 64, generator=gen))


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 64), (63, 20, 80), (200, 30, 128), (70, 9, 256)])
def test_merge_segments(gen, n, m, dim, poisoned):
    check_segments(cpp_impl.merge_segments, gen, n, m, dim)


def test_merge_segments_at_the_edges(gen):
    check_edges(cpp_impl.merge_segments, gen)


def test_means_are_the_same_on_any_number_of_threads(gen):
    k, v, lv, assign = clusters(gen, 300, 90, 64, "cpu")
    seg = torch_impl.Segments.from_assignment(assign, 90)
    log_w = torch.randn(len(seg.rows), generator=gen)
    wanted = cpp_impl.merge_segments(k, v, lv, log_w, seg)
    with threads(1):
        alone = cpp_impl.merge_segments(k, v, lv, log_w, seg)
    assert all(torch.equal(a, b) for a, b in zip(wanted, alone, strict=True))
    with pytest.raises(ValueError, match="do not belong"):
        cpp_impl.merge_segments(k, v, lv, log_w[:-1], seg)


layer = partial(random_layer, dim=64, shift=0.0, noise=1.0, votes=1.0, spread=2.0, dtype=torch.float32)


def policy(m, whole=()):
    return replace(span_policy(KeepKVConfig(enabled=True), m, sinks=4, whole=whole), threshold=0.1)


CASES = {
    "prompt": (layer(300, 32, references=64), policy(60)),
    "reply": (layer(192, 32, ctx=150), policy(77)),
    "protected": (layer(700, 8, references=60, ctx=33, dim=80, group=1), policy(60, whole=((0, 20), (40, 50)))),
    "more slots than queries": (layer(257, 16, references=10, ctx=5, dim=128, group=4), policy(200)),
    "one slot": (layer(70, 5, references=3, group=8), policy(1)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fit_against_float64(name):
    """The whole compression of a layer: same tokens kept, same clusters; keys, values and votes to float32 rounding, of
    which the solved equations amplify some."""
    x, p = CASES[name]
    got, wanted = compress_layer(x, p), compress_layer(cast(x, torch.float64), p)
    assert torch.equal(got.kept, wanted.kept) and torch.equal(got.assign, wanted.assign)
    assert (got.k - wanted.k).abs().max() < TOLERANCE
    assert (got.lv - wanted.lv).abs().max() < 5e-5
    assert (got.v - wanted.v).abs().max() < 5e-4


def test_the_one_pass_is_taken_and_gives_what_torch_gives(monkeypatch):
    x, p = CASES["prompt"]
    taken = []
    original = cpp_impl.fit
    monkeypatch.setattr(cpp_impl, "fit", lambda *a, **k: taken.append(1) or original(*a, **k))
    fast = compress_layer(x, p)
    assert taken
    monkeypatch.setenv("KEEPKV_CPU_KERNEL", "torch")
    slow = compress_layer(x, p)
    assert len(taken) == 1
    torch.testing.assert_close(fast.v, slow.v, rtol=0, atol=5e-4)
    torch.testing.assert_close(fast.lv, slow.lv, rtol=0, atol=5e-5)


def test_what_is_not_finite_stays_with_its_slot():
    """A slot whose value overflows is left as it was; nothing of it reaches the others."""
    x, p = CASES["prompt"]
    x = replace(x, v=x.v.clone())
    x.v[299, 0, 0] = torch.inf  # a recent token: kept in every head
    got = compress_layer(x, p)
    assert got.v[:-1].isfinite().all() and got.lv.isfinite().all()
    assert torch.equal(got.v[-1, 0], x.v[299, 0]) and torch.equal(got.lv[-1, 0], x.lv[299, 0])


def fit_arguments(heads=3, m=20, queries=70, dim=64):
    gen = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    first = torch.randint(0, 90, (heads, m), generator=gen)
    position = torch.cat([torch.full((40,), 100), torch.arange(queries - 40) + 60])
    return [
        *(normal(heads, m, dim), normal(heads, m, dim), normal(heads, m), first),
        *(normal(heads, queries, dim) * dim**-0.5, position, normal(heads, queries) + 5, normal(heads, queries) + 2),
        *(normal(heads, queries, dim), torch.rand(queries, generator=gen)),
    ]


NUMBERS = {"fixed": 2, "steps": 5, "max_correction": 4.0, "max_log_mass": 20.0, "ridge": 0.03, "min_ridge": 1e-3}
PER_HEAD = (0, 1, 2, 3, 4, 6, 7, 8)


def test_bits_do_not_depend_on_threads_or_on_other_heads():
    arguments = fit_arguments()
    wanted = cpp_impl.fit(*arguments, **NUMBERS)
    with threads(1):
        alone = cpp_impl.fit(*arguments, **NUMBERS)
    last = cpp_impl.fit(*(x[2:] if i in PER_HEAD else x for i, x in enumerate(arguments)), **NUMBERS)
    for name in wanted._fields:
        assert torch.equal(getattr(alone, name), getattr(wanted, name)), name
        assert torch.equal(getattr(last, name)[0], getattr(wanted, name)[2]), name


def test_normal_equations_in_float64(poisoned):
    """Votes by the five steps, A and R as compress/rules/attention_matching.py defines them, term by term."""
    k, v, start, first, q, position, log_z, log_z_ctx, output, weight = (
        x.double() if x.is_floating_point() else x for x in fit_arguments()
    )
    e = (torch.einsum("hmd,hqd->hmq", k, q) - log_z[:, None]).clamp(max=20.0).exp()
    e = e.masked_fill(first[..., None] > position, 0.0)
    outside = (log_z_ctx - log_z).exp()
    share, lv = (1 - outside).clamp(min=0.0), start
    for _ in range(5):
        mass = (lv.exp()[..., None] * e).sum(1)
        step = ((e * (weight * share / mass)[:, None]).sum(2) / (e * weight).sum(2)).log()
        step[:, :2] = 0.0
        lv = start + (lv - start + step).clamp(-4.0, 4.0)
    mass = (lv.exp()[..., None] * e).sum(1)
    a = lv.exp()[..., None] * e / (outside + mass)[:, None] * weight.sqrt()
    r = weight.sqrt()[:, None] * output - a.transpose(1, 2) @ v
    a[:, :2] = 0.0
    gram = a @ a.transpose(1, 2)
    ridge = 0.03 * gram.diagonal(dim1=1, dim2=2).sum(1) / q.shape[1] + 1e-3
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    got = cpp_impl.fit(*fit_arguments(), **NUMBERS)
    for name, wanted in (("votes", lv), ("gram", gram), ("rhs", a @ r)):
        wrong = (getattr(got, name) - wanted).abs() / (1 + wanted.abs())
        assert wrong.max() < 2e-5, (name, float(wrong.max()))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_other_instruction_sets(march, tmp_path, monkeypatch, gen):
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    library = cpu_build.build("merge", march)
    for name in ("_nearest", "_segments", "_fit"):
        function = cpu_build.load(library, f"keepkv{name}")
        function.argtypes = getattr(cpp_impl, name).argtypes
        monkeypatch.setattr(cpp_impl, name, function)
    test_the_fit_against_float64("prompt")
    test_the_fit_against_float64("protected")
    k = torch.randn(1, 40, 72, generator=gen)
    arguments = k, torch.arange(20, 40)[None], torch.arange(20)[None], torch.ones(1, 20, dtype=torch.bool)
    assert torch.equal(cpp_impl.nearest_kept(*arguments)[1], torch_impl.nearest_kept(*arguments)[1])
    check_segments(cpp_impl.merge_segments, gen, 63, 20, 72)


def test_fit_refuses_what_it_cannot_read():
    good = fit_arguments()
    with pytest.raises(ValueError, match="float32"):
        cpp_impl.fit(good[0].double(), *good[1:], **NUMBERS)
    with pytest.raises(ValueError, match="expected"):
        cpp_impl.fit(*good[:2], good[2][:, :3], *good[3:], **NUMBERS)
    with pytest.raises(ValueError, match="multiples of 8"):
        cpp_impl.fit(*fit_arguments(dim=12), **NUMBERS)
