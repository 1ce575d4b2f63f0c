"""A PackedCase through SGLang's Triton kernels and ours for packed spans, as backend/triton.py joins them."""

from __future__ import annotations

import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

from keepkv_sglang.kernels.attention import reference, triton_packed
from keepkv_sglang.kernels.attention.packed import Layers
from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, requests_of_tokens, vote_score_mod
from tests.support.paged import DEVICE, ROUNDING, WEIGHTS

SPLITS = 4


class PackedStock:
    """The case's pools, rows and spans on the device. `cut` finds the spans; `attend` returns a layer's output.

    SGLang's kernels load slot 0 for padding: it is made finite, as it is in SGLang's pools.
    """

    def __init__(self, case):
        self.case = case
        layers = case.layers
        for pools in (layers.keys, layers.values):
            for pool in pools:
                pool[0] = pool[0].nan_to_num(0)
        self.layers = Layers(
            *([x.to(DEVICE) for x in pools] for pools in (layers.keys, layers.values, layers.log_votes))
        )
        width = len(layers.keys) * layers.heads + 1
        self.starts = torch.zeros(max(case.starts, default=0) + 1, width, dtype=torch.int64)
        for number, start in case.starts.items():
            self.starts[number] = start
        self.starts = self.starts.to(DEVICE)
        address = torch.tensor([self.starts.data_ptr()], device=DEVICE)
        self.cells = triton_packed.CellTable(self.layers, case.span_of.to(DEVICE), address)
        self.table, self.rows, self.lens, self.q = (x.to(DEVICE) for x in (case.table, case.rows, case.lens, case.q))
        self.news = None if case.news is None else case.news.to(DEVICE)
        group = case.q.shape[1] // layers.heads
        self.tables = [VoteTable([votes], group) for votes in self.layers.log_votes]

    def follow(self):
        """What has changed in the case, to the same addresses."""
        pairs = [(self.table, self.case.table), (self.cells.span_of, self.case.span_of), (self.q, self.case.q)]
        for name in ("keys", "values", "log_votes"):
            pairs += zip(getattr(self.layers, name), getattr(self.case.layers, name), strict=True)
        for there, here in pairs:
            there.copy_(here)

    def cut(self, lens=None, keep_last=None, into=None):
        """into: what an earlier call returned, whose buffers are written."""
        before = lens if lens is not None else self.lens if self.news is None else self.lens - self.news
        counts = [torch.zeros(len(self.rows) + 1, dtype=torch.int32, device=DEVICE) for _ in range(2)]
        indices = torch.full((int(before.sum()),), 1 << 40, device=DEVICE)
        keep = self.news is None if keep_last is None else keep_last
        buffers = (counts[0], indices, counts[1]) if into is None else (into.indptr, into.indices, into.first)
        return triton_packed.cut(self.cells, self.table, self.rows, before, *buffers, keep)

    def attend(self, layer, found=None, join=True):
        """join False: SGLang's kernels alone."""
        found = self.cut() if found is None else found
        q, scale, out = self.q, self.case.scale, torch.full_like(self.q, float("nan"))
        pools, table = (self.layers.keys[layer], self.layers.values[layer]), self.tables[layer]
        mod = {"score_mod": vote_score_mod, "aux_tensors": table.aux(0)}
        if self.news is None:
            table.point(found.indptr, found.indices)
            shape = (*q.shape[:2], SPLITS)
            part = torch.full((*shape, q.shape[2]), float("nan"), device=DEVICE)
            lse = torch.full(shape, float("-inf"), device=DEVICE)
            splits = torch.full((len(q),), SPLITS, dtype=torch.int32, device=DEVICE)
            where = (found.indptr, found.indices, part, lse, splits, SPLITS)
            decode_attention_fwd(q, *pools, out, *where, scale, 1.0, 1.0, **mod)
            if join:
                triton_packed.decode(q, found, layer, scale, part, lse, out)
            return out
        queries = torch.cat([self.news.new_zeros(1), self.news.cumsum(0)])
        table.point(found.indptr, found.indices, requests_of_tokens(queries, len(q)))
        ends = zip(self.rows, self.lens, self.news, strict=True)
        slots = torch.cat([self.table[r, n - m : n] for r, n, m in ends]).long()
        lse = torch.full(q.shape[:2], float("nan"), device=DEVICE)
        new = (pools[0][slots], pools[1][slots])
        where = (queries, found.indptr, found.indices, None, True, None, int(self.news.max()), 1.0, 1.0, scale)
        extend_attention_fwd(q, *new, out, *pools, *where, lse_extend=lse, **mod)
        if join:
            triton_packed.extend(q, found, layer, scale, queries, lse, out)
        return out


def plain_new_tokens(case):
    """Log votes of 0 for the tokens of this forward, as the backend resets them before the kernel runs."""
    news = torch.ones_like(case.lens) if case.news is None else case.news
    for row, length, new in zip(case.rows, case.lens, news, strict=True):
        for votes in case.layers.log_votes:
            votes[case.table[row, length - new : length].long()] = 0.0
    return case


def error(case, out, layer):
    """Largest deviation from float64 over slots and cells, beyond rounding to the storage: of an extend twice, since
    the slots' part is rounded before it is joined."""
    wanted = case.run(reference, case.cut(), layer, q=case.q.double())
    assert out.isfinite().all()
    rounding = ROUNDING[out.dtype] * (1 if case.news is None else 2)
    allowed = rounding * wanted.abs() + (WEIGHTS[out.dtype] if out.is_cuda else 0.0)
    return ((out.cpu().double() - wanted).abs() - allowed).max().item()
