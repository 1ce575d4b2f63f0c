"""SGLang's own decode_attention_fwd and extend_attention_fwd with our score_mod, against the float64 equation."""

from __future__ import annotations

import pytest
import torch

from tests.support.paged import DEVICE, TOLERANCE, Case, clean, ragged

pytest.importorskip("sglang")  # scripts/gpu_check.sh runs where it may be missing

from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import (
    build_unified_kv_indices,
    extend_attention_fwd,
    extend_attention_fwd_unified,
)

from keepkv_sglang.kernels.attention.triton_score_mod import (
    VoteTable,
    requests_of_tokens,
    vote_score_mod,
)
from keepkv_sglang.tools.compile_cases import pretend

SPLITS = 4


class Stock:
    """SGLang's kernels behind the contract of our implementations. table: a VoteTable to use, None for plain."""

    def __init__(self, votes, heads, unified=False):
        self.table = None if votes is None else VoteTable([votes], heads[0] // heads[1])
        self.unified = unified

    def _mod(self, *where):
        if self.table is None:
            return {}
        self.table.point(*where)
        return {"score_mod": vote_score_mod, "aux_tensors": self.table.aux(0)}

    def decode(self, q, k, v, _votes, table, rows, lens, scale, out):
        indptr, indices = ragged(table, rows, lens)
        shape = (*q.shape[:2], SPLITS)
        logits = torch.full((*shape, q.shape[2]), float("nan"), device=DEVICE)
        lse = torch.full(shape, float("nan"), device=DEVICE)
        splits = torch.full((len(lens),), SPLITS, dtype=torch.int32, device=DEVICE)
        mod = self._mod(indptr, indices)
        decode_attention_fwd(
            q, k, v, out, indptr, indices, logits, lse, splits, SPLITS, scale, 1.0, 1.0, **mod
        )  # fmt: skip

    def extend(self, q, k, v, _votes, table, rows, lens, news, scale, out, causal):
        indptr, indices = ragged(table, rows, lens - news)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=DEVICE), news.cumsum(0)])
        slots = torch.cat([table[r, n - m : n] for r, n, m in zip(rows, lens, news, strict=True)]).long()
        mod = self._mod(indptr, indices, requests_of_tokens(starts, len(q)))
        most = int(news.max())
        if not self.unified:
            extend_attention_fwd(
                q, k[slots], v[slots], out, k, v, starts, indptr, indices, None, causal, None, most, 1.0, 1.0, scale,
                **mod,
            )  # fmt: skip
            return
        unified = build_unified_kv_indices(indptr, indices, starts[:-1], news, slots, len(rows))
        prefix = unified[2].to(torch.int32)
        extend_attention_fwd_unified(
            q, out, k, v, 1.0, 1.0, starts, unified[0], unified[1], prefix, most,
            sm_scale=scale, is_causal=causal, **mod,
        )  # fmt: skip


def plain_new_tokens(case):
    """Log votes of 0 for the tokens of this extend, as the backend resets them before the kernel runs."""
    for i, new in enumerate(case.news.tolist()):
        case.votes[case.slots(i)[len(case.slots(i)) - new :]] = 0.0
    return case


HEADS = [((3, 3), 80), ((6, 2), 64), ((4, 1), 128), ((8, 1), 64)]


@pytest.mark.parametrize(("heads", "dim"), HEADS)
def test_decode(heads, dim, stock_dtype):
    case = clean(Case([1, 63, 500], heads=heads, dim=dim, dtype=stock_dtype))
    assert case.error(case.run(Stock(case.votes, heads))) < TOLERANCE


def test_decode_of_a_long_request(stock_dtype):
    case = clean(Case([2047], heads=(3, 1), dtype=stock_dtype))
    assert case.error(case.run(Stock(case.votes, (3, 1)))) < TOLERANCE


@pytest.mark.parametrize(("heads", "dim", "unified"), [(*shape, False) for shape in HEADS] + [(*HEADS[1], True)])
def test_extend(heads, dim, unified, stock_dtype):
    """unified: the kernel of --enable-deterministic-inference."""
    case = clean(plain_new_tokens(Case([1, 63, 150, 77], [1, 63, 1, 70], heads=heads, dim=dim, dtype=stock_dtype)))
    assert case.error(case.run(Stock(case.votes, heads, unified))) < TOLERANCE


def test_extend_with_tiles_of_128_keys(stock_dtype):
    """SGLang's tiles on sm_80, where the score_mod loads votes in two halves."""
    case = clean(plain_new_tokens(Case([150, 77], [1, 70], heads=(3, 1), dtype=stock_dtype)))
    with pretend(80):
        assert case.error(case.run(Stock(case.votes, (3, 1)))) < TOLERANCE


@pytest.mark.parametrize("news", [None, [3, 20]])
def test_votes_of_one_are_the_bits_of_stock_sglang(news, stock_dtype):
    case = clean(Case([63, 130], news, heads=(3, 1), dtype=stock_dtype))
    case.votes.zero_()
    assert case.same(case.run(Stock(case.votes, (3, 1))), case.run(Stock(None, (3, 1))))


@pytest.mark.parametrize("masked", [float("-inf"), -1e30])
@pytest.mark.parametrize("news", [None, [2, 1]])
def test_masked_entries_weigh_exactly_nothing(news, masked, stock_dtype):
    """Whole key blocks, and in a decode whole splits; another key of the request is always there in a server."""
    case = clean(Case([150, 300], news, heads=(3, 1), dtype=stock_dtype))
    case.votes[case.slots(0)[:100]] = masked
    case.votes[case.slots(1)[:-1]] = masked
    if news:
        plain_new_tokens(case)
    out = case.run(Stock(case.votes, (3, 1)))
    assert case.error(out) < TOLERANCE
    moved = torch.where((case.votes <= -1e29)[:, :, None], case.v + 100, case.v)
    assert torch.equal(case.run(Stock(case.votes, (3, 1)), v=moved), out)


def test_large_votes_stay_finite(stock_dtype):
    case = clean(Case([90, 300], heads=(3, 1), dtype=stock_dtype))
    case.votes[case.slots(1)[123]] = 1e4
    assert case.error(case.run(Stock(case.votes, (3, 1)))) < TOLERANCE


def test_one_table_serves_forward_after_forward_at_one_address(stock_dtype):
    """What a CUDA graph relies on: the address is the same, contents follow votes and batch."""
    case = clean(plain_new_tokens(Case([63, 90], [5, 90], heads=(3, 1), dtype=stock_dtype)))
    stock = Stock(case.votes, (3, 1))
    address = stock.table.aux(0)[0].data_ptr()
    assert case.error(case.run(stock)) < TOLERANCE
    case.news, case.q = None, case.q[:2]
    case.votes[case.slots(1)[3]] = 2.5
    assert case.error(case.run(stock)) < TOLERANCE
    assert stock.table.aux(0)[0].data_ptr() == address


def test_a_table_of_wrong_dtypes_is_refused():
    votes = torch.zeros(4, 2, device=DEVICE)
    with pytest.raises(ValueError, match="float32"):
        VoteTable([votes.double()], 1)
    table = VoteTable([votes], 1)
    indptr, indices = torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="int64"):
        table.point(indptr, indices.int())
    with pytest.raises(ValueError, match="int32"):
        table.point(indptr.long(), indices)


def test_requests_of_tokens():
    indptr = torch.tensor([0, 2, 2, 5], dtype=torch.int64)
    assert requests_of_tokens(indptr, 7).tolist() == [0, 0, 2, 2, 2, 2, 2]
