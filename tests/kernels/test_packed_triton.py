"""Packed spans in Triton: SGLang's kernels over the slots and ours over the cells are the equation over both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sglang")  # scripts/gpu_check.sh runs where it may be missing

from keepkv_sglang.kernels.attention import triton_impl, triton_packed
from keepkv_sglang.kernels.attention.packed import Layers
from tests.support.packed_case import PackedCase
from tests.support.packed_stock import PackedStock, error, plain_new_tokens
from tests.support.paged import DEVICE, INTERPRETED, ROUNDING, TOLERANCE

LENS, SPANS = [20, 9, 50, 3, 1], [[30, 1], [], [40, 7, 50], [5], [60]]
NEWS = [1, 9, 20, 2, 1]
# (q heads, kv heads), head size: groups of 1, 4 and 7
SHAPES = [((2, 2), 96), ((8, 2), 64), ((7, 1), 128)]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    if INTERPRETED:  # a program takes 10 ms
        monkeypatch.setattr(triton_impl, "_DECODE_PROGRAMS", 16)


def test_cut_is_that_of_the_cpu():
    case = PackedCase(LENS, SPANS)
    stock, cut = PackedStock(case), case.cut()
    found = stock.cut()
    assert found.indptr.diff().tolist() == cut.lens.tolist() and found.first.tolist() == cut.first.tolist()
    raw = found.indices[: found.indptr[-1]].split(found.indptr.diff().tolist())
    assert [x.tolist() for x in raw] == [row[:n].tolist() for row, n in zip(cut.table, cut.lens, strict=True)]
    entries = found.indices[found.indptr[-1] :][: found.first[-1]]
    assert (entries & 0xFFFFFFFF).tolist() == cut.spans.tolist()
    request = torch.repeat_interleave(torch.arange(len(LENS)), found.first.diff().cpu())
    for at, (entry, b) in enumerate(zip(entries.tolist(), request.tolist(), strict=True)):
        m, place = int(cut.at[at + 1] - cut.at[at]), entry >> 32
        assert torch.equal(case.table[case.rows[b], place : place + m], cut.slots[cut.at[at] : cut.at[at + 1]])


def test_cut_of_long_rows_of_many_spans():
    """More than one block of slots, spans beside each other and across its end, more spans than are read at once."""
    case = PackedCase([40, 1500], [[3] * 40, [600, 2, 500]], heads=(2, 1), layers=2, apart=False)
    found, cut = PackedStock(case).cut(), case.cut()
    assert found.indptr.diff().tolist() == cut.lens.tolist() and found.first.tolist() == cut.first.tolist()
    entries = found.indices[found.indptr[-1] :][: found.first[-1]]
    assert (entries & 0xFFFFFFFF).tolist() == cut.spans.tolist()


def test_the_last_slot_of_a_row_is_kept():
    """What pads a graph's batch is a row of one slot, whoever's that is; its span is not there."""
    case = PackedCase([6], [[5]])
    found = PackedStock(case).cut(lens=torch.tensor([4]), keep_last=True)
    assert found.indptr.tolist() == [0, 4] and found.first.tolist() == [0, 0]  # 3 slots, and one of the span
    found = PackedStock(case).cut(lens=torch.tensor([4]), keep_last=False)
    assert found.indptr.tolist() == [0, 3] and found.first.tolist() == [0, 1]


@pytest.mark.parametrize("news", [None, NEWS], ids=["decode", "extend"])
@pytest.mark.parametrize(("heads", "dim"), SHAPES, ids=str)
def test_attention_is_equation_6_over_slots_and_cells(heads, dim, news, stock_dtype):
    """Several spans and none, one slot beside a span, a head without cells and one with most of them, over layers."""
    case = plain_new_tokens(PackedCase(LENS, SPANS, news, heads=heads, dim=dim, dtype=stock_dtype, layers=2))
    stock = PackedStock(case)
    for layer in (0, 1) if dim == 96 else (1,):  # the cells of both lie in both
        assert error(case, stock.attend(layer), layer) < TOLERANCE


@pytest.mark.parametrize("news", [None, [3, 2]], ids=["decode", "extend"])
def test_more_spans_than_are_read_at_once(news, stock_dtype):
    case = PackedCase([9, 4], [[3, 1, 2, 1] * 10, [9]], news, (4, 2), 64, 2, stock_dtype, across=False, apart=False)
    plain_new_tokens(case)
    assert error(case, PackedStock(case).attend(1), 1) < TOLERANCE


@pytest.mark.parametrize("news", [None, [3, 2]], ids=["decode", "extend"])
@pytest.mark.parametrize("vote", [0.0, 30.0, float("-inf"), -1e30])
def test_votes_of_cells(vote, news, stock_dtype):
    """One token each, far stronger than all others, masked: in one cell, and in a whole head's."""
    case = plain_new_tokens(PackedCase([9, 5], [[40], [12]], news, heads=(4, 2), layers=2, dtype=stock_dtype))
    cut = case.cut()
    runs = [case.packed(cut, 0).runs(b, 1, head).tolist() for b in (0, 1) for head in (0, 1)]
    alone = next(run for run in runs if len(run) > 2)
    for layer, slot, head in [alone[1], *max(runs[2:], key=len)]:
        case.layers.log_votes[layer][slot, head] = vote
    assert error(case, PackedStock(case).attend(1), 1) < TOLERANCE


@pytest.mark.parametrize("news", [None, [3]], ids=["decode", "extend"])
def test_one_cell_may_outweigh_all_others(news, stock_dtype):
    case = plain_new_tokens(PackedCase([9], [[40]], news, heads=(4, 2), layers=2, dtype=stock_dtype))
    cut = case.cut()
    head, run = max(((h, case.packed(cut, 0).runs(0, 1, h).tolist()) for h in (0, 1)), key=lambda x: len(x[1]))
    layer, slot, at = run[len(run) // 2]
    case.layers.log_votes[layer][slot, at] = 1e4
    out, value = PackedStock(case).attend(1).cpu(), case.layers.values[layer][slot, at]
    assert torch.equal(out[:, 2 * head : 2 * head + 2], value.expand(len(out), 2, -1))


@pytest.mark.parametrize("news", [None, [3, 2, 4]], ids=["decode", "extend"])
def test_rows_and_heads_without_cells_keep_sglangs_bits(news, stock_dtype):
    case = plain_new_tokens(PackedCase([9, 70, 30], [[40], [], []], news, heads=(4, 2), layers=2, dtype=stock_dtype))
    start = case.starts[7]
    start[3] = start[2]  # of layer 1 head 0 has no cell, and head 1 what it had
    stock = PackedStock(case)
    joined, alone = stock.attend(1), stock.attend(1, join=False)
    first = 1 if news is None else news[0]
    assert torch.equal(joined[first:], alone[first:])
    assert torch.equal(joined[:first, :2], alone[:first, :2])
    assert (joined[:first, 2:] != alone[:first, 2:]).any()


@pytest.mark.parametrize("news", [None, [3, 2]], ids=["decode", "extend"])
def test_the_same_number_of_cells_in_every_head_is_an_ordinary_span(news, stock_dtype):
    """Runs of m cells for each head, each layer's in it: m slots, whose order the equation does not care about."""
    case = PackedCase([9, 5], [[7, 40], [12]], news, heads=(4, 2), layers=2, dtype=stock_dtype)
    plain_new_tokens(case)
    for number, start in case.starts.items():
        case.starts[number] = torch.arange(5) * (int(start[-1]) // 4)
    plain = PackedStock(case)
    wanted = plain.attend(1, found=_uncut(plain))
    for number, start in case.starts.items():
        slots = [s for row in case.table for s in row.tolist() if s >= 0 and case.span_of[s] == number]
        for pools in (case.layers.keys, case.layers.values, case.layers.log_votes):
            for pool in pools:  # [m, H, ...]: written head by head, run by run
                pool[slots] = pool[slots].transpose(0, 1).reshape(pool[slots].shape).clone()
        assert int(start[-1]) == 4 * len(slots)
    got = PackedStock(case).attend(1)
    # Sums in another order; 16-bit storage of the result, and of an extend's part over the slots.
    assert (got - wanted).abs().max() < TOLERANCE + 3 * ROUNDING[got.dtype] * wanted.abs().max()


def _uncut(stock):
    """The same rows with no slot packed."""
    packed = stock.cells.span_of.clone()
    stock.cells.span_of.zero_()
    found = stock.cut()
    stock.cells.span_of.copy_(packed)
    return found


def test_gathered_cells_are_the_runs(stock_dtype):
    """As the C++ ones are (test_packed.py)."""
    few = PackedCase([20, 9], [[30, 1, 40], []], heads=(4, 2), layers=3, dtype=stock_dtype)
    many = PackedCase([9], [[3, 1, 2, 1] * 10], heads=(4, 2), layers=3, dtype=stock_dtype, apart=False)
    for case in (few, many):
        check_gathered(case, PackedStock(case))


def check_gathered(case, stock):
    packed = case.packed(case.cut(), 0)
    there = replace(packed, layers=stock.layers, slots=packed.slots.to(DEVICE))
    room = packed.longest([1, 2]) + 3
    keys, votes = (x.cpu() for x in triton_packed.gather_cells(there, [1, 2], room))
    for at, (layer, head) in enumerate((layer, head) for layer in (1, 2) for head in range(2)):
        cells = packed.runs(0, layer, head).tolist()
        wanted = [case.layers.keys[a][s, h] for a, s, h in cells]
        assert not cells or torch.equal(keys[at, : len(cells)], torch.stack(wanted))
        assert votes[at, : len(cells)].tolist() == [float(case.layers.log_votes[a][s, h]) for a, s, h in cells]
        assert keys[at, len(cells) :].eq(0).all() and votes[at, len(cells) :].eq(-torch.inf).all()


def test_what_does_not_fit_is_refused():
    stock = PackedStock(PackedCase([9], [[7]], heads=(4, 2), layers=2))
    found, q, out = stock.cut(), stock.q, torch.empty_like(stock.q)
    with pytest.raises(ValueError, match="parts"):
        triton_packed.decode(q, found, 0, 1.0, torch.zeros(1, 4, 3, 64), torch.zeros(1, 4, 2), out)
    with pytest.raises(ValueError, match="log-sum-exp"):
        triton_packed.extend(q, found, 0, 1.0, found.first, torch.zeros(1, 3), out)
    pool = torch.zeros(100)
    keys, one = [pool[:16].view(2, 1, 8), pool[17:33].view(2, 1, 8)], [pool[:2].view(2, 1)]
    odd = Layers(keys, one, one)
    with pytest.raises(ValueError, match="multiples of 8"):
        _ = odd.offsets
