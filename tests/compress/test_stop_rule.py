"""The offline stop rule against its formula written out, and what it promises about the ladder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.compress.stop_rule import attention_lost, smallest_m
from keepkv_sglang.kernels.merge import reference
from tests.support.layers import random_layer

P = SpanPolicy(20, "mean", 4, 2, 0.6, pool_kernel=1, whole=((5, 8),))

layer = partial(random_layer, n=100, w=4, ctx=5, shift=0.0, noise=1.0, votes=1.0)


def test_loss_equals_the_formula():
    x = layer()
    kept, _ = reference.select(reference.snapkv_score(x, 1), P)
    full, part = [], []
    for h in range(6):
        a = reference.head_of(replace(x, q=x.q[:, [h]], k=x.k[:, [h // 3]], v=x.v[:, [h // 3]], lv=x.lv[:, [h // 3]],
                                      k_ctx=x.k_ctx[:, [h // 3]], lv_ctx=x.lv_ctx[:, [h // 3]]), 0)  # fmt: skip
        attention = torch.where(a.seen, (a.lv[:, None] + a.logits - a.log_z).exp(), 0.0)
        full.append(torch.linalg.matrix_norm(attention))
        part.append(torch.linalg.matrix_norm(attention[kept[h // 3]]))
    assert attention_lost(x, P) == pytest.approx(1 - float(sum(part) / sum(full)), abs=1e-12)


def test_it_goes_down_until_the_worst_layer_loses_too_much():
    layers = [layer(seed=0, spread=30.0), layer(seed=1, spread=6.0)]
    ladder = (0.9, 0.5, 0.2, 0.1, 0.05)
    steps = [3 + -(-97 * int(b * 100) // 100) for b in ladder]
    for threshold in (0.001, 0.01, 0.1):
        m = smallest_m(layers, P, ladder, threshold)
        lost = {s: max(attention_lost(x, replace(P, m=s)) for x in layers) for s in steps}
        fine = [s for s in steps if all(lost[t] <= threshold for t in steps if t >= s)]
        assert m == min(fine, default=100), (threshold, lost)
    assert smallest_m(layers[:1], P, ladder, 0.01) < smallest_m([layer(seed=2, spread=0.0)], P, ladder, 0.01) == 100
    assert smallest_m(layers, P, ladder, 1.0) == min(steps), "a threshold that nothing exceeds: the last step"
    assert smallest_m(layers, P, ladder, 1.0, floor=22) == steps[2] == 23
    assert smallest_m(layers, P, (), 1.0) == 100 == smallest_m(layers, P, (1.0,), 1.0)


def test_more_whole_tokens_lose_no_more():
    x, p = layer(), replace(P, whole=())
    assert attention_lost(x, replace(p, m=20)) >= attention_lost(x, replace(p, m=30, whole=((50, 60),)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [([], "one length"), ([layer(), layer(n=50)], "one length"),
     ([replace(layer(), q=layer().q[:0], q_index=layer().q_index[:0])], "needs window queries")],
    ids=["none", "lengths", "queries"],
)  # fmt: skip
def test_what_it_refuses(layers, message):
    with pytest.raises(ValueError, match=message):
        smallest_m(layers, P)
