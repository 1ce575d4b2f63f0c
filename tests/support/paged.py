"""Paged pools with scattered slots for the tests of attention, on the CPU or a GPU."""

from __future__ import annotations

import os

import torch

from keepkv_sglang.kernels.attention import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

# Logits and sums are float32: up to 2047 terms of size 1 with relative rounding 6e-8 and an exp accurate to 1e-7 give
# a few 1e-6 on outputs of size 1. A wrong formula is off by more than 1e-3.
TOLERANCE = 1e-5
# 16-bit storage: the oracle reads the same rounded inputs; the interpreter computes in float32, so only the rounding of
# the result comes on top: half a unit in the last of 8 (bfloat16) or 11 bits.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# SGLang's kernels name no precision for their products, so a GPU would compute float32 ones in TF32: 11 bits, off by
# far more than TOLERANCE though right. There they are run with the storage of a server.
STOCK_DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16]
# Compiled, the softmax weights are rounded to the storage as well: each by half a unit, so the output by that times
# sum w |v| <= max |v|, here about 4.
WEIGHTS = {d: 4 * r for d, r in ROUNDING.items()}


class Case:
    """Pools with scattered slots; news = None is a decode. Unused pool slots hold NaN: reading one is noticed."""

    def __init__(self, lens, news=None, heads=(9, 3), dim=64, dtype=torch.float32, seed=0, spread=2.0, device=DEVICE):
        self.gen = torch.Generator().manual_seed(seed)
        hq, hkv = heads
        used = sum(lens)
        slots = torch.randperm(used + 50, generator=self.gen)[:used]
        k, v = (torch.full((used + 50, hkv, dim), float("nan"), dtype=dtype) for _ in range(2))
        for pool in (k, v):
            pool[slots] = self.randn(used, hkv, dim).to(dtype)
        votes = torch.full((used + 50, hkv), float("nan"))
        votes[slots] = torch.rand(used, hkv, generator=self.gen) * spread
        table = torch.full((len(lens) + 3, max(lens) + 5), -7, dtype=torch.int32)
        rows = torch.randperm(len(lens) + 3, generator=self.gen)[: len(lens)]
        start = 0
        for row, n in zip(rows.tolist(), lens, strict=True):
            table[row, :n] = slots[start : start + n].int()
            start += n
        q = self.randn(len(lens) if news is None else sum(news), hq, dim).to(dtype)
        self.k, self.v, self.votes, self.table, self.rows, self.q = (
            x.to(device) for x in (k, v, votes, table, rows, q)
        )
        self.lens, self.scale = torch.tensor(lens, device=device), dim**-0.5
        self.news = None if news is None else torch.tensor(news, device=device)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.gen)

    def slots(self, i):
        return self.table[self.rows[i], : self.lens[i]].long()

    def run(self, impl, causal=True, q=None, out=None, **changes):
        """Runs decode or extend into an `out` of NaN."""
        q = self.q if q is None else q
        out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device) if out is None else out
        names = ("k", "v", "votes", "table", "rows", "lens")
        shared = [changes.get(name, getattr(self, name)) for name in names]
        if self.news is None:
            impl.decode(q, *shared, self.scale, out)
        else:
            impl.extend(q, *shared, changes.get("news", self.news), self.scale, out, causal)
        return out

    def wanted(self, **kwargs):
        """Float64 by the reference, on the CPU."""
        case = object.__new__(Case)
        case.__dict__ = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()}
        return case.run(reference, q=case.q.double(), **kwargs)

    def same(self, got, wanted):
        """Whether two kernels computed the same: the same bits in the interpreter. Compiled, one with other arguments
        is another kernel, whose compiler may fuse a multiplication with an addition or sum in another order: float32
        rounding, and a unit in the last place where a 16-bit rounding then falls to the other side."""
        if INTERPRETED:
            return torch.equal(got, wanted)
        unit = 1e-6 + 2 * ROUNDING[got.dtype]
        return bool(((got - wanted).abs() <= unit * wanted.abs().max()).all())

    def error(self, got, **kwargs):
        """Largest deviation of `got` from float64 beyond what rounding to the storage explains."""
        wanted = self.wanted(**kwargs)
        assert got.isfinite().all()
        allowed = ROUNDING[got.dtype] * wanted.abs() + (WEIGHTS[got.dtype] if got.is_cuda else 0.0)
        return ((got.cpu().double() - wanted).abs() - allowed).max().item()


def ragged(table, rows, lens):
    """kv_indptr int32 [B + 1] and kv_indices int64, as SGLang builds them."""
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64, device=DEVICE), lens.cumsum(0)]).int()
    return indptr, torch.cat([table[r, :n] for r, n in zip(rows, lens, strict=True)]).long()


def clean(case):
    """SGLang's kernels load slot 0 for padding: it must be finite there, as it is in SGLang's pools."""
    case.k[0], case.v[0] = case.k[0].nan_to_num(0), case.v[0].nan_to_num(0)
    return case


# Checks of an implementation, for the CPU's and for Triton


def check_votes_count_like_copies(case, impl):
    """Votes of 3 equal the same entry three times: the meaning of Eq. 6, without the reference. A decode of one request
    of 40 tokens."""
    slots = case.slots(0)
    case.votes[slots] = 0.0
    case.table[case.rows[0], 38:40] = slots[0].int()
    copies = case.run(impl)
    case.votes[slots[0]] = torch.tensor(3.0).log()
    votes = case.run(impl, lens=case.lens - 2)
    assert (copies - votes).abs().max() < TOLERANCE


def check_strided_tensors(case, impl):
    """q as a view of a fused qkv, K and V interleaved in one buffer, out as a view: only its own elements change."""
    n, hq, dim = case.q.shape
    fused = torch.randn(n, (hq + 6) * dim, device=case.q.device)
    q = fused[:, : hq * dim].view(n, hq, dim)
    q.copy_(case.q)
    pool = torch.stack([case.k, case.v], dim=1)
    wide = torch.full((n, hq + 2, dim), 7.0, device=case.q.device)
    wide[:, 1:-1] = float("nan")
    out = case.run(impl, q=q, k=pool[:, 0], v=pool[:, 1], out=wide[:, 1:-1])
    assert torch.equal(out, case.run(impl))
    assert wide[:, 0].eq(7).all() and wide[:, -1].eq(7).all()


def check_nothing_but_out_is_written(case, impl):
    before = [x.clone() for x in (case.q, case.k, case.v, case.votes, case.table)]
    case.run(impl)
    after = (case.q, case.k, case.v, case.votes, case.table)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(after, before, strict=True))
