"""CUDA graphs: captured once, replayed with other votes, other slots and other queries at the same addresses.

Only on a GPU (scripts/gpu_check.sh); passed on an H200 (docs/gpu.md).
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from keepkv_sglang.kernels.attention import triton_impl  # noqa: E402
from tests.support.graph_changes import CHANGES, LENS, PACKED, PACKED_CHANGES, STALE  # noqa: E402
from tests.support.packed_case import PackedCase  # noqa: E402
from tests.support.paged import TOLERANCE, Case  # noqa: E402


def captured(call):
    """A graph of call(), warmed up on a side stream as PyTorch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replays_follow(case, graph, out, prepare=lambda: None):
    """One change at a time, each of which makes the output before it wrong; prepare: what a server does between."""
    graph.replay()
    torch.cuda.synchronize()
    assert case.error(out) < TOLERANCE
    for change in CHANGES:
        change(case)
        assert case.error(out) > STALE, f"{change.__name__} changes nothing that a stale replay would miss"
        prepare()
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert case.error(out) < TOLERANCE, change.__name__


def test_replay_of_our_decode_follows_votes_slots_and_queries():
    case = Case(LENS, dtype=torch.bfloat16)
    out = torch.empty_like(case.q)
    arguments = (case.k, case.v, case.votes, case.table, case.rows, case.lens, case.scale)
    graph = captured(lambda: triton_impl.decode(case.q, *arguments, out))
    replays_follow(case, graph, out)


def test_replay_of_sglang_decode_follows_the_vote_table():
    pytest.importorskip("sglang")  # only this: a part of it that is missing is a failure
    from sglang.kernels.ops.attention import decode_attention as ops

    from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, vote_score_mod

    case = Case(LENS, dtype=torch.bfloat16)
    case.k[0], case.v[0] = case.k[0].nan_to_num(0), case.v[0].nan_to_num(0)
    table = VoteTable([case.votes], 3)
    indptr = torch.zeros(len(LENS) + 1, dtype=torch.int32, device="cuda")
    indptr[1:] = case.lens.cumsum(0)
    indices = torch.cat([case.slots(i) for i in range(len(LENS))])
    table.point(indptr, indices)
    out, splits = torch.empty_like(case.q), 8
    part = torch.empty(*case.q.shape[:2], splits, case.q.shape[2], device="cuda")
    lse = torch.empty(part.shape[:3], device="cuda")
    count = torch.full((len(LENS),), splits, dtype=torch.int32, device="cuda")
    arguments = (indptr, indices, part, lse, count, splits, case.scale, 1.0, 1.0)
    mod = {"score_mod": vote_score_mod, "aux_tensors": table.aux(0)}
    graph = captured(lambda: ops.decode_attention_fwd(case.q, case.k, case.v, out, *arguments, **mod))
    replays_follow(case, graph, out, lambda: indices.copy_(torch.cat([case.slots(i) for i in range(len(LENS))])))


def test_replay_of_packed_decode_follows_rows_votes_and_queries():
    """SGLang's decode and ours over packed spans; the rows are cut again before each replay, as a server does."""
    pytest.importorskip("sglang")  # only this: a part of it that is missing is a failure
    from tests.support.packed_stock import PackedStock, error  # imports sglang

    case = PackedCase(*PACKED, dtype=torch.bfloat16)
    stock, outs = PackedStock(case), []
    found = stock.cut()
    graph = captured(lambda: outs.append(stock.attend(1, found)))
    out = outs[-1]
    graph.replay()
    torch.cuda.synchronize()
    assert error(case, out, 1) < TOLERANCE
    for change in PACKED_CHANGES:
        change(case)
        stock.follow()
        assert error(case, out, 1) > STALE, f"{change.__name__} changes nothing that a stale replay would miss"
        stock.cut(into=found)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert error(case, out, 1) < TOLERANCE, change.__name__
