"""The changes of test_cuda_graph.py would show a replay that missed one: that needs no GPU."""

from __future__ import annotations

import torch

from tests.support.graph_changes import CHANGES, LENS, STALE
from tests.support.paged import Case


def test_each_change_makes_the_output_before_it_wrong():
    case = Case(LENS, dtype=torch.bfloat16)
    for change in CHANGES:
        before = case.wanted().to(torch.bfloat16)
        assert case.error(before) <= 0
        change(case)
        assert case.error(before) > STALE, change.__name__
