"""A span whose heads share its cells, compressed as a GPU does it: our Triton kernels, and torch for the rest."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.compress.batch import Rows, Storage
from keepkv_sglang.compress.packed import compress_packed
from keepkv_sglang.compress.select import SpanPolicy, left_raw
from keepkv_sglang.kernels.attention import triton_packed
from keepkv_sglang.kernels.merge import torch_impl
from keepkv_sglang.memory.cells import PackedCells
from tests.kernels.test_cost_triton import WAITING, Count
from tests.support.paged import DEVICE

LAYERS, HEADS, GROUP, DIM, CONTEXT, N, QUERIES, M = 2, 2, 2, 16, 10, 60, 8, 18


class Turns:
    """A pool and two turns, the second behind the first one's packed span. Heads look at their span more or less
    sharply, so they want different numbers of tokens."""

    def __init__(self, device):
        gen = torch.Generator().manual_seed(0)
        slots = CONTEXT + 2 * N + 2 * M

        def pool(*shape):
            return torch.randn(slots, *shape, generator=gen)

        keys = [pool(HEADS, DIM) * torch.tensor([0.4, 1.0 + layer])[:, None] for layer in range(LAYERS)]
        values = [pool(HEADS, DIM) for _ in range(LAYERS)]
        keys, values = ([x.to(device) for x in pools] for pools in (keys, values))
        votes = [torch.zeros(slots, HEADS, device=device) for _ in range(LAYERS)]
        self.storage = Storage(keys, values, votes, [DIM**-0.5] * LAYERS)
        self.cells = PackedCells.of(keys, values, votes)
        order = torch.randperm(slots, generator=gen).to(device)
        self.context, *self.spans = order.split([CONTEXT, N, N, M, M])
        self.q = torch.randn(LAYERS, QUERIES, HEADS * GROUP, DIM, generator=gen).to(device)
        self.q_index = torch.cat([torch.full((QUERIES // 2,), N), torch.arange(N - QUERIES // 2, N)])

    def rows(self, turn):
        before = self.context if turn == 0 else torch.cat([self.context, self.spans[2]])
        context, packed = self.cells.of_row(before, self.spans[turn])
        return Rows(context, self.spans[turn], self.spans[2 + turn], packed=packed)

    def compress(self, rows, heads):
        p = SpanPolicy(M, "attention_matching", 6, 2, 0.2, scorer="window_references", heads=heads)
        told = []
        queries = (lambda layer: self.q[layer], HEADS * GROUP, self.q_index)
        results = list(
            compress_packed(self.storage, rows, *queries, p, left_raw(p, N), 1 << 20, lambda *x: told.append(x))
        )
        return *told[0], results


@pytest.mark.parametrize("heads", ["all", "layer"])
def test_it_is_what_the_cpu_gives(heads, monkeypatch):
    here, cpu = Turns(DEVICE), Turns("cpu")
    gathered, gather = [], triton_packed.gather_cells
    monkeypatch.setattr(triton_packed, "gather_cells", lambda *a: gathered.append(a) or gather(*a))
    for turn in (0, 1):
        monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
        slots, counts, got = here.compress(here.rows(turn), heads)
        here.cells.add(slots, counts)
        assert bool(gathered) == (turn == 1)
        monkeypatch.delenv("KEEPKV_GPU_KERNEL")  # C++, on tensors of a CPU
        slots, wanted_counts, wanted = cpu.compress(cpu.rows(turn), heads)
        cpu.cells.add(slots, wanted_counts)
        assert torch.equal(counts, wanted_counts) and counts.unique().numel() > 1
        assert heads == "layer" or counts.unique().numel() < counts.numel(), "no heads are merged at once"
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.kept.cpu(), b.kept)
            for name in ("k", "v", "lv"):
                # The fit solves normal equations, which makes rounding of 1e-6 a hundred times as large.
                torch.testing.assert_close(getattr(a, name).cpu(), getattr(b, name), rtol=1e-3, atol=1e-4)
        assert torch.equal(here.cells.span_of.cpu(), cpu.cells.span_of)


def test_the_host_waits_for_the_number_of_cells_alone(monkeypatch):
    """Each head's number of tokens is a shape of what follows. Here it is read with tolist(), which is not counted; on
    a GPU it is the one thing that waits."""
    monkeypatch.setenv("KEEPKV_GPU_KERNEL", "triton")
    monkeypatch.setattr(torch_impl, "known_to_host", lambda x: False)
    turns = Turns(DEVICE)
    slots, counts, _ = turns.compress(turns.rows(0), "all")
    turns.cells.add(slots, counts)
    rows = turns.rows(1)
    with Count().counting() as count:
        _, counts, _ = turns.compress(rows, "all")
    assert not WAITING & set(count.names)
    sizes = counts.unique().numel()
    assert sizes < LAYERS * HEADS and count.names.total() <= 650 * sizes, "uniform asks as much of all heads at once"
