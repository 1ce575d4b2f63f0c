"""Rows with packed spans for the tests of attention: pools of several layers, spans with runs of random lengths."""

from __future__ import annotations

import torch

from keepkv_sglang.kernels.attention.packed import Cut, Layers, Packed, find_spans


class PackedCase:
    """`spans[b]`: slots of each packed span of request b; `lens[b]`: its other slots; news None: a decode.

    A row reads: half of the other slots, then span, one slot, span, one slot, ..., then the rest; not apart: the spans
    beside each other. Slots in no row are NaN. across: runs cross layers; else each layer's runs stay in it.
    """

    def __init__(
        self,
        lens,
        spans,
        news=None,
        heads=(9, 3),
        dim=64,
        layers=3,
        dtype=torch.float32,
        across=True,
        seed=0,
        apart=True,
    ):
        gen = torch.Generator().manual_seed(seed)
        hq, hkv = heads
        used = sum(lens) + sum(m for row in spans for m in row)
        order = iter(torch.randperm(used + 50, generator=gen)[:used].tolist())

        def pool(*shape, spread=None):
            out = torch.full((used + 50, *shape), float("nan"))
            out[taken] = (
                torch.randn(used, *shape, generator=gen) if spread is None else torch.rand(used, *shape, generator=gen)
            )
            return out

        self.span_of = torch.zeros(used + 50, dtype=torch.int32)
        rows, starts = [], {}
        for length, row in zip(lens, spans, strict=True):
            slots = [next(order) for _ in range(length // 2)]
            for m in row:
                own = [next(order) for _ in range(m)]
                number = len(starts) + 7
                self.span_of[own] = number
                starts[number] = self._start(m, layers, hkv, across, gen)
                slots += [*own, next(order)] if apart else own
            slots += [next(order) for _ in range(length - length // 2 - (len(row) if apart else 0))]
            rows.append(slots)
        taken = [s for row in rows for s in row]
        self.layers = Layers(
            [pool(hkv, dim).to(dtype) for _ in range(layers)],
            [pool(hkv, dim).to(dtype) for _ in range(layers)],
            [pool(hkv, spread=2.0) for _ in range(layers)],
        )
        self.table = torch.full((len(lens) + 2, max(map(len, rows)) + 3), -7, dtype=torch.int32)
        self.rows = torch.randperm(len(lens) + 2, generator=gen)[: len(lens)]
        for at, row in zip(self.rows.tolist(), rows, strict=True):
            self.table[at, : len(row)] = torch.tensor(row, dtype=torch.int32)
        self.lens = torch.tensor([len(row) for row in rows])
        self.news = None if news is None else torch.tensor(news)
        self.q = torch.randn(len(lens) if news is None else sum(news), hq, dim, generator=gen).to(dtype)
        self.starts, self.scale = starts, dim**-0.5

    @staticmethod
    def _start(m, layers, heads, across, gen):
        """A span's run starts: the first head has none, the second a lot."""
        groups, size = (1, layers * heads) if across else (layers, heads)
        cuts = [0]
        for _ in range(groups):
            inner = torch.randint(0, m * size + 1, (size - 1,), generator=gen).sort().values
            inner[:1] = 0
            cuts += [cuts[-1] + int(x) for x in inner] + [cuts[-1] + m * size]
        return torch.tensor(cuts)

    def cut(self):
        """cpp_impl.cut in torch (test_packed.py compares them): a GPU machine may have no C++."""
        raw, slots, at, spans, first = [], [], [0], [], [0]
        for row, length in zip(self.rows.tolist(), self.lens.tolist(), strict=True):
            line = self.table[row, :length]
            outside, inside, ends, numbers = find_spans(self.span_of[line.long()])
            raw.append(line[outside])
            slots.append(line[inside])
            at += (ends[1:] + at[-1]).tolist()
            spans += numbers.tolist()
            first.append(len(spans))
        table = torch.nn.utils.rnn.pad_sequence(raw, batch_first=True)
        counts, numbers = torch.tensor([len(x) for x in raw]), torch.tensor(spans, dtype=torch.int64)
        return Cut(
            table, torch.arange(len(raw)), counts, torch.tensor(first), torch.tensor(at), torch.cat(slots), numbers
        )

    def packed(self, cut, layer):
        start = torch.stack([self.starts[int(n)] for n in cut.spans])
        return Packed(self.layers, cut.first, cut.at, cut.slots, start, layer)

    def run(self, impl, cut, layer, q=None):
        q = self.q if q is None else q
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        pools = (self.layers.keys[layer], self.layers.values[layer], self.layers.log_votes[layer])
        shared = (q, *pools, cut.table, cut.rows, cut.lens)
        if self.news is None:
            impl.decode(*shared, self.scale, out, packed=self.packed(cut, layer))
        else:
            impl.extend(*shared, self.news, self.scale, out, packed=self.packed(cut, layer))
        return out
