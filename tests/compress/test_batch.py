"""Layers side by side give what one layer at a time gives, and write nothing else."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.compress.batch import Rows, Storage, compress_rows, layer_groups
from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.select import SpanPolicy
from tests.support.layers import in_slots

LAYERS, SLOTS, HEADS, GROUP, DIM = 5, 90, 2, 3, 8
ROWS = Rows(torch.arange(5, 17), torch.arange(20, 63), torch.tensor([70, 3, 71, 20, 21, 88]))


def storage(scales=(0.3,) * LAYERS) -> Storage:
    torch.manual_seed(0)

    def buffers(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(SLOTS, HEADS, *shape) for _ in range(LAYERS)]

    return Storage(buffers(DIM), buffers(DIM), [x.abs() for x in buffers()], list(scales))


def copy(x: Storage) -> Storage:
    return Storage(*([t.clone() for t in part] for part in (x.keys, x.values, x.log_votes)), x.scales)


@pytest.mark.parametrize("rule", ["attention_matching", "least_squares", "tangent", "mean", "evict", "value_refit"])
@pytest.mark.parametrize("scratch", [8_000, 40_000, 64 << 20], ids=["one", "some", "all"])
def test_side_by_side_is_one_at_a_time(rule, scratch):
    policy = SpanPolicy(m=6, merge=rule, sinks=1, recent=2, threshold=0.0)
    before = storage()
    q = torch.randn(LAYERS, 7, HEADS * GROUP, DIM)
    index = torch.tensor([42, 42, 38, 39, 40, 41, 42])
    after = copy(before)
    results = list(compress_rows(after, ROWS, q.__getitem__, q[0].shape[1], index, policy, scratch))
    assert len(results) == LAYERS
    untouched = torch.ones(SLOTS, dtype=torch.bool)
    untouched[ROWS.target] = False
    for i, result in enumerate(results):
        k, v, lv = before.keys[i], before.values[i], before.log_votes[i]
        alone = compress_layer(in_slots(q[i], index, (k, v, lv), ROWS.source, ROWS.context, 0.3), policy)
        assert torch.equal(result.kept, alone.kept) and torch.equal(result.assign, alone.assign)
        # Sums of a batch of another size may be taken in another order.
        for name, buffers in (("k", after.keys), ("v", after.values), ("lv", after.log_votes)):
            torch.testing.assert_close(getattr(result, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
            assert torch.equal(buffers[i][ROWS.target], getattr(result, name))
        for old, new in zip((k, v, lv), (after.keys[i], after.values[i], after.log_votes[i]), strict=True):
            assert torch.equal(old[untouched], new[untouched])


def test_groups_fit_the_scratch_and_do_not_mix_scales():
    all_of_them = list(range(LAYERS))
    assert layer_groups(storage(), ROWS, 7, HEADS * GROUP, 64 << 20) == [all_of_them]
    assert layer_groups(storage(), ROWS, 7, HEADS * GROUP, 1) == [[i] for i in all_of_them]
    logits = 2 * 43 * 7 * HEADS * GROUP * 4
    assert layer_groups(storage(), ROWS, 7, HEADS * GROUP, 2 * logits) == [[0, 1], [2, 3], [4]]
    kv = (12 + 43) * HEADS * DIM * 2 * 4
    assert layer_groups(storage(), ROWS, 0, HEADS * GROUP, 3 * kv) == [[0, 1, 2], [3, 4]]
    assert layer_groups(storage((0.3, 0.3, 0.2, 0.2, 0.3)), ROWS, 7, 6, 64 << 20) == [[0, 1], [2, 3], [4]]


def test_a_pool_without_layers():
    empty, policy = Storage([], [], [], []), SpanPolicy(m=6, merge="mean", sinks=1, recent=2, threshold=0.0)

    def never(layer: int) -> torch.Tensor:
        raise AssertionError(layer)

    assert list(compress_rows(empty, ROWS, never, 4, torch.arange(3), policy, 1)) == []
