"""The changes of test_cuda_graph.py would show a replay that missed one: that needs no GPU."""

from __future__ import annotations

import torch

from keepkv_sglang.kernels.attention import reference
from tests.support.graph_changes import CHANGES, LENS, PACKED, PACKED_CHANGES, STALE
from tests.support.packed_case import PackedCase
from tests.support.paged import Case


def test_each_change_makes_the_output_before_it_wrong():
    case = Case(LENS, dtype=torch.bfloat16)
    for change in CHANGES:
        before = case.wanted().to(torch.bfloat16)
        assert case.error(before) <= 0
        change(case)
        assert case.error(before) > STALE, change.__name__


def test_each_change_of_packed_rows_does():
    case = PackedCase(*PACKED, dtype=torch.bfloat16)
    for change in PACKED_CHANGES:
        before = case.run(reference, case.cut(), 1, q=case.q.double())
        change(case)
        after = case.run(reference, case.cut(), 1, q=case.q.double())
        assert (before - after).abs().max() > 2 * STALE, change.__name__  # rounding takes less than one of them
