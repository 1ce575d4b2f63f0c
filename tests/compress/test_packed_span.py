"""A span becomes a packed span: every head gets its own number of tokens, and what is written is what was merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keepkv_sglang.compress.batch import Rows, Storage, compress_rows
from keepkv_sglang.compress.by_head import score_heads
from keepkv_sglang.compress.heads import slots_of_heads
from keepkv_sglang.compress.layer import LayerInput, compress_layer
from keepkv_sglang.compress.packed import compress_packed, shares_cells
from keepkv_sglang.compress.select import SpanPolicy, left_raw
from keepkv_sglang.memory.cells import PackedCells

LAYERS, HEADS, GROUP, DIM, CONTEXT, N, W = 4, 2, 2, 16, 30, 200, 24
SCALE = DIM**-0.5


def policy(heads="all", **changes):
    return SpanPolicy(
        **{
            "m": 60, "merge": "attention_matching", "recent": 16, "sinks": 2, "threshold": 0.2,
            "scorer": "window_references", "heads": heads, **changes,
        }
    )  # fmt: skip


def by_layer(results):
    results = list(results)
    return [results[at : at + HEADS] for at in range(0, len(results), HEADS)]


class Pool:
    """A pool of random contents, its cells, and a row: a context, then the span. Heads look at their span more or less
    sharply, so they want different numbers of tokens."""

    def __init__(self, seed=0):
        gen = torch.Generator().manual_seed(seed)
        slots = CONTEXT + N + 100
        keys, values = ([torch.randn(slots, HEADS, DIM, generator=gen) for _ in range(LAYERS)] for _ in range(2))
        for layer in range(LAYERS):
            keys[layer] *= torch.tensor([0.4, 1.0 + layer])[:, None]
        votes = [torch.zeros(slots, HEADS) for _ in range(LAYERS)]
        self.storage = Storage(keys, values, votes, [SCALE] * LAYERS)
        self.cells = PackedCells.of(keys, values, votes)
        order = torch.randperm(slots, generator=gen)
        self.context, self.span, self.fresh = order.split([CONTEXT, N, 100])
        self.q = torch.randn(LAYERS, W, HEADS * GROUP, DIM, generator=gen)
        self.q_index = torch.cat([torch.full((W // 2,), N), torch.arange(N - W // 2, N)])

    def inputs(self, layer, n=N):
        keys, values, votes = (pool[layer] for pool in (self.storage.keys, self.storage.values, self.storage.log_votes))
        at, ctx = self.span[:n], self.context
        return LayerInput(self.q[layer], self.q_index, keys[ctx], votes[ctx], keys[at], values[at], votes[at], SCALE)

    def compress(self, p, target=None, scratch=1 << 16):
        left = left_raw(p, N)
        target = self.fresh[: p.m] if target is None else target
        told = []
        results = compress_packed(
            self.storage, Rows(self.context, self.span, target), lambda i: self.q[i], HEADS * GROUP, self.q_index, p,
            left, scratch, lambda *found: told.append(found),
        )  # fmt: skip
        noted = by_layer(results)
        ((slots, counts),) = told
        assert torch.equal(slots, target[p.whole_tokens : p.m - left])
        self.cells.add(slots, counts)
        return target, counts, noted

    def read(self, target, p, layer, head):
        """k, v, lv of a head as attention reads them: whole, its run, recent."""
        left = left_raw(p, N)
        slots, packed = self.cells.of_row(target)
        whole = [(layer, int(s), head) for s in slots[: p.whole_tokens]]
        recent = [(layer, int(s), head) for s in slots[len(slots) - left :]]
        assert len(slots) == p.whole_tokens + left
        cells = [*whole, *packed.runs(0, layer, head).tolist(), *recent]
        pools = (self.storage.keys, self.storage.values, self.storage.log_votes)
        return [torch.stack([pool[a][s, h] for a, s, h in cells]) for pool in pools]


@pytest.mark.parametrize("heads", ["layer", "all"])
@pytest.mark.parametrize(
    "changes", [{}, {"whole": ((5, 9), (40, 41))}, {"shares": ((20, 60, 15),)}, {"merge": "evict"}]
)
@pytest.mark.parametrize("scratch", [1, 1 << 30])
def test_each_head_is_compressed_to_its_own_number(heads, changes, scratch):
    p, pool = policy(heads, **changes), Pool()
    inputs = [pool.inputs(layer) for layer in range(LAYERS)]
    target, counts, noted = pool.compress(p, scratch=scratch)
    left = left_raw(p, N)
    scores = torch.stack([torch.cat([s.scores for s in score_heads(x, p)]) for x in inputs])
    assert (counts + p.whole_tokens + left).tolist() == slots_of_heads(scores, p, heads)
    assert int(counts.sum()) == LAYERS * HEADS * (p.m - p.whole_tokens - left)
    assert counts.float().std() > 5  # or nothing is tested
    if heads == "layer":
        assert (counts.sum(1) == HEADS * (p.m - p.whole_tokens - left)).all()
    recent = min(p.recent, p.free // 2)
    for layer in range(LAYERS):
        for head in range(HEADS):
            x, q_heads = inputs[layer], slice(head * GROUP, (head + 1) * GROUP)
            one = LayerInput(
                x.q[:, q_heads], x.q_index, *(t[:, head : head + 1] for t in (x.k_ctx, x.lv_ctx, x.k, x.v, x.lv)), SCALE
            )
            count = int(counts[layer, head]) + p.whole_tokens + left
            wanted = compress_layer(one, replace(p, m=count, recent=recent, carried=recent))
            got = noted[layer][head]
            assert torch.equal(got.kept, wanted.kept) and torch.equal(got.assign, wanted.assign)
            k, v, lv = pool.read(target, p, layer, head)
            for found, of_rule in ((k, wanted.k[:, 0]), (v, wanted.v[:, 0]), (lv, wanted.lv[:, 0])):
                # Heads that are scored together are summed in another order than one alone: float32 rounding.
                assert found.shape == of_rule.shape and (found - of_rule).abs().max() < 2e-5


@pytest.mark.parametrize("heads", ["layer", "all"])
def test_the_result_may_stand_in_the_spans_own_slots(heads):
    """Cells of one layer lie in another, which must have been read before it is overwritten."""
    p, beside, inside = policy(heads), Pool(), Pool()
    target, counts, _ = beside.compress(p, scratch=1)
    own, same, _ = inside.compress(p, target=inside.span[: p.m], scratch=1)
    assert torch.equal(counts, same)
    for layer in range(LAYERS):
        for head in range(HEADS):
            for a, b in zip(beside.read(target, p, layer, head), inside.read(own, p, layer, head), strict=True):
                assert torch.equal(a, b)


def test_only_the_target_is_written():
    p, pool = policy(), Pool()
    before = [x.clone() for part in (pool.storage.keys, pool.storage.values, pool.storage.log_votes) for x in part]
    target, *_ = pool.compress(p)
    after = [x for part in (pool.storage.keys, pool.storage.values, pool.storage.log_votes) for x in part]
    others = torch.ones(len(before[0]), dtype=torch.bool).index_fill(0, target, False)
    assert all(torch.equal(a[others], b[others]) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("heads", ["uniform", "all"])
def test_a_packed_context_counts_as_its_cells(heads):
    """What is compressed behind a packed span sees it: the same as behind a context of each head's own entries."""
    p, pool = policy(), Pool()
    target, *_ = pool.compress(p)
    slots, packed = pool.cells.of_row(target)
    gen = torch.Generator().manual_seed(9)
    behind = torch.arange(len(pool.cells.span_of))[pool.cells.span_of == 0]
    behind = behind[torch.isin(behind, torch.cat([target, pool.context]), invert=True)][:80]
    queries = torch.randn(LAYERS, 40, HEADS * GROUP, DIM, generator=gen)
    index, later = torch.arange(40, 80), replace(p, m=20, heads=heads, recent=6, sinks=0)
    rows = Rows(torch.cat([pool.context, slots]), behind, behind[:20], None, packed)
    wanted = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            k, _, lv = pool.read(target, p, layer, head)
            own = slice(head, head + 1)
            span = [x[layer][behind][:, own].clone() for x in (pool.storage.keys, pool.storage.values)]
            k_ctx = torch.cat([pool.storage.keys[layer][pool.context][:, head], k])[:, None]
            lv_ctx = torch.cat([pool.storage.log_votes[layer][pool.context][:, head], lv])[:, None]
            q = queries[layer][:, head * GROUP : (head + 1) * GROUP]
            x = LayerInput(q, index, k_ctx, lv_ctx, *span, torch.zeros(80, 1), SCALE)
            wanted.append((x, layer, head))
    before = [(x, layer, head, score_heads(x, later)[0].scores) for x, layer, head in wanted]
    if heads == "uniform":
        results = list(compress_rows(pool.storage, rows, lambda i: queries[i], HEADS * GROUP, index, later, 1 << 20))
        for x, layer, head, _ in before:
            one = compress_layer(x, later)
            assert torch.equal(results[layer].assign[head], one.assign[0])
            assert (results[layer].v[:, head] - one.v[:, 0]).abs().max() < 2e-5  # rounding, as above
        return
    told = []
    noted = by_layer(compress_packed(
        pool.storage, rows, lambda i: queries[i], HEADS * GROUP, index, later, left_raw(later, 80), 1 << 20,
        lambda *found: told.append(found),
    ))  # fmt: skip
    ((_, counts),) = told
    scores = torch.cat([found for *_, found in before]).view(LAYERS, HEADS, -1)
    assert (counts + left_raw(later, 80)).tolist() == slots_of_heads(scores, later, heads)
    for x, layer, head, _ in before:
        count = int(counts[layer, head]) + left_raw(later, 80)
        one = compress_layer(x, replace(later, m=count, recent=6, carried=6))
        assert torch.equal(noted[layer][head].assign, one.assign)


def test_what_is_not_shared_out():
    assert shares_cells(policy(), 16) and shares_cells(policy("layer"), 16)
    assert not shares_cells(policy("uniform"), 16)
    assert not shares_cells(policy(scorer="keydiff"), 16)
    assert not shares_cells(policy(m=20, whole=((0, 4),)), 16)  # all of it stays raw


def test_numbers_of_spans_that_are_gone_are_used_again():
    pool = Pool()
    counts, most = torch.full((LAYERS, HEADS), 2), 0
    for i in range(1000):
        pool.cells.add(pool.fresh[i % 50 * 2 :][:2], counts)  # overwrites what was added 50 rounds ago
        most = max(most, int(pool.cells.span_of.max()))
    assert most < 128
    kept, packed = pool.cells.of_row(pool.fresh)
    assert len(kept) == 0 and len(packed.at) == 51
    pool.cells.reset(pool.fresh)
    assert pool.cells.of_row(pool.fresh)[1] is None
    with pytest.raises(ValueError, match="share out"):
        pool.cells.add(pool.fresh[:3], counts)
