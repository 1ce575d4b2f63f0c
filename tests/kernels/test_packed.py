"""Packed spans on a CPU: cells are numbered as packed.py says, and C++ attends to them as the equation does."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.kernels.attention import cpp_impl, reference
from keepkv_sglang.kernels.attention.packed import Layers
from tests.support.packed_case import PackedCase
from tests.support.paged import ROUNDING, TOLERANCE
from tests.support.threads import threads

LENS, SPANS = [40, 9, 700, 3], [[30, 1], [], [400, 7, 90], [5]]


@pytest.fixture(autouse=True)
def _threads():
    with threads(1):
        yield


def cut_of(case):
    return cpp_impl.cut(case.table, case.rows, case.lens, case.span_of)


def test_cut_takes_the_spans_out_and_keeps_the_order():
    case = PackedCase(LENS, SPANS)
    cut = cut_of(case)
    assert cut.lens.tolist() == LENS
    assert cut.first.tolist() == [0, 2, 2, 5, 6]
    assert cut.at.diff().tolist() == [30, 1, 400, 7, 90, 5]
    assert cut.spans.tolist() == list(case.starts)
    for b, row in enumerate(case.rows):
        slots = case.table[row, : case.lens[b]].tolist()
        assert cut.table[b, : cut.lens[b]].tolist() == [s for s in slots if case.span_of[s] == 0]
        mine = cut.slots[cut.at[cut.first[b]] : cut.at[cut.first[b + 1]]]
        assert mine.tolist() == [s for s in slots if case.span_of[s] != 0]


def test_rows_are_cut_in_torch_as_in_cpp():
    for case in (PackedCase(LENS, SPANS), PackedCase([9, 4], [[3, 1, 2], [5]], apart=False)):
        cut, own = cut_of(case), case.cut()
        for row, wanted, length in zip(own.table, cut.table, cut.lens, strict=True):
            assert torch.equal(row[:length], wanted[:length])
        for name in ("lens", "first", "at", "slots", "spans"):
            assert torch.equal(getattr(own, name), getattr(cut, name)), name


def test_runs_share_out_every_cell_once():
    case = PackedCase(LENS, SPANS)
    cut = cut_of(case)
    packed = case.packed(cut, 0)
    runs = [packed.runs(0, layer, head).tolist() for layer in range(3) for head in range(3)]
    found = sorted(tuple(cell) for run in runs for cell in run)
    slots = cut.slots[: cut.at[2]].tolist()
    assert found == sorted((layer, s, h) for layer in range(3) for s in slots for h in range(3))
    assert packed.longest([0, 1]) == max(len(run) for run in runs[:6])


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("news", [None, [1, 9, 130, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((9, 3), 64), ((4, 1), 80), ((14, 2), 128)])
def test_attention_is_equation_6_over_slots_and_cells(heads, dim, dtype, news, across):
    case = PackedCase(LENS, SPANS, news, heads=heads, dim=dim, dtype=dtype, across=across)
    cut = cut_of(case)
    for layer in (0, 2):
        got = case.run(cpp_impl, cut, layer)
        wanted = case.run(reference, cut, layer, q=case.q.double())
        assert ((got.double() - wanted).abs() - ROUNDING[dtype] * wanted.abs()).max() < TOLERANCE


def test_bits_do_not_depend_on_neighbours_or_threads():
    case = PackedCase(LENS, SPANS)
    whole = case.run(cpp_impl, cut_of(case), 1)
    with threads(2):
        assert torch.equal(case.run(cpp_impl, cut_of(case), 1), whole)
    case.rows, case.lens, case.q = case.rows[2:3], case.lens[2:3], case.q[2:3]
    assert torch.equal(case.run(cpp_impl, cut_of(case), 1), whole[2:3])


@pytest.mark.parametrize("news", [None, [1, 9, 130, 2]])
def test_the_same_number_of_cells_in_every_head_is_an_ordinary_span(news):
    """Runs of m cells for each head, each layer's in it, are m slots: the equation does not care about order."""
    case = PackedCase(LENS, SPANS, news, across=False)
    for number, start in case.starts.items():
        m = int(start[-1]) // 9
        case.starts[number] = torch.arange(10) * m
    cut, plain = cut_of(case), torch.zeros_like(case.span_of)
    whole = cpp_impl.cut(case.table, case.rows, case.lens, plain)
    assert whole.lens.equal(case.lens) and len(whole.spans) == 0
    # Cells of a slot are neighbours in a run, whatever their heads: written so that head h has its m in its own run.
    for number, start in case.starts.items():
        slots = (case.span_of == number).nonzero()[:, 0]
        slots = torch.tensor([s for s in cut.slots.tolist() if s in set(slots.tolist())])
        for pool in (case.layers.keys, case.layers.values, case.layers.log_votes):
            for layer in range(3):
                cells = pool[layer][slots].transpose(0, 1).clone()  # [H, m, ...], head by head
                pool[layer][slots] = cells.reshape(len(slots), 3, *cells.shape[2:])
        assert start[-1] == 9 * len(slots)
    packed = case.run(cpp_impl, cut, 1)
    for number in case.starts:
        slots = torch.tensor([s for s in cut.slots.tolist() if case.span_of[s] == number])
        for pool in (case.layers.keys, case.layers.values, case.layers.log_votes):
            for layer in range(3):
                runs = pool[layer][slots].reshape(3, len(slots), *pool[layer].shape[2:])
                pool[layer][slots] = runs.transpose(0, 1).clone()
    out = torch.full_like(case.q, float("nan"))
    pools = (case.layers.keys[1], case.layers.values[1], case.layers.log_votes[1])
    if news is None:
        cpp_impl.decode(case.q, *pools, case.table, case.rows, case.lens, case.scale, out)
    else:
        cpp_impl.extend(case.q, *pools, case.table, case.rows, case.lens, case.news, case.scale, out)
    assert (packed - out).abs().max() < TOLERANCE


def test_gathered_cells_are_the_runs():
    case = PackedCase(LENS, SPANS)
    packed = case.packed(cut_of(case), 0)
    room = packed.longest([1, 2]) + 3
    keys, votes = cpp_impl.gather_cells(packed, [1, 2], room)
    for at, (layer, head) in enumerate((layer, head) for layer in (1, 2) for head in range(3)):
        cells = packed.runs(0, layer, head).tolist()
        wanted = [case.layers.keys[a][s, h] for a, s, h in cells]
        assert not cells or torch.equal(keys[at, : len(cells)], torch.stack(wanted))
        assert votes[at, : len(cells)].tolist() == [float(case.layers.log_votes[a][s, h]) for a, s, h in cells]
        assert keys[at, len(cells) :].eq(0).all() and votes[at, len(cells) :].eq(-torch.inf).all()


def test_what_does_not_fit_is_refused():
    case = PackedCase(LENS, SPANS)
    cut = cut_of(case)
    number = next(iter(case.starts))
    case.starts[number] = case.starts[number] + 1
    with pytest.raises(IndexError, match="packed span"):
        case.run(cpp_impl, cut, 0)
    case.table[case.rows[0], 0] = 10**6
    with pytest.raises(IndexError, match="slot"):
        cut_of(case)
    with pytest.raises(ValueError, match="uniform"):
        Layers([torch.zeros(4, 2, 8), torch.zeros(4, 2, 16)], [torch.zeros(4, 2, 8)], [torch.zeros(4, 2)])
