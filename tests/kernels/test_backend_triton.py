"""keepkv_sglang/backend/triton.py with a stand-in for SGLang's model runner: its own kernels, metadata made by hand.

SGLang's metadata, KV writes and CUDA graphs are not run here; what is tested is what our class adds to them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.paged import DEVICE, INTERPRETED, TOLERANCE, Case

pytest.importorskip("sglang")  # scripts/gpu_check.sh runs where it may be missing

from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

from keepkv_sglang.kernels.attention import triton_impl, triton_packed
from keepkv_sglang.settings.config import ConfigError
from tests.support.packed_case import PackedCase
from tests.support.packed_stock import error, plain_new_tokens
from tests.support.triton_stand import FIRST, HEADS, PackedLayer, Stand


@pytest.mark.parametrize("news", [None, [40, 3, 9]])
def test_a_forward_weights_by_votes_resets_what_it_writes_and_keeps_queries(news, stock_dtype, monkeypatch):
    stand = Stand(Case([40, 90, 9], news, heads=HEADS, dtype=stock_dtype), monkeypatch)
    case, batch = stand.case, stand.batch()
    others = stand.votes.log_votes[0].clone()
    before = case.votes.clone()
    rows, kept = torch.tensor([0, 2], device=DEVICE), torch.tensor([5, 1], device=DEVICE)
    stand.runtime.capture = (rows, kept)
    stand.backend.init_forward_metadata(batch)
    out = stand.attend(batch)
    before[batch.out_cache_loc] = 0.0
    assert torch.equal(case.votes.nan_to_num(9), before.nan_to_num(9)) and torch.equal(stand.votes.log_votes[0], others)
    assert case.error(out) < TOLERANCE
    assert torch.equal(stand.arena.queries[1, kept], case.q[rows])
    unused = [row for row in range(9) if row not in kept.tolist()]
    assert stand.arena.queries[1, unused].isnan().all() and stand.arena.queries[0].isnan().all()
    assert stand.runtime.scales == {FIRST + 1: case.scale} and stand.runtime.capture is None


def test_a_prefill_of_rows_without_votes_is_sglangs_own(stock_dtype, monkeypatch):
    """And the next forward has votes again, whatever the hook says of it."""
    stand = Stand(Case([40, 90, 9], [40, 3, 9], heads=HEADS, dtype=stock_dtype), monkeypatch)
    case, batch, passed = stand.case, stand.batch(), []
    real = stand.backend.extend_attention_fwd
    monkeypatch.setattr(stand.backend, "extend_attention_fwd", lambda *a, **k: passed.append(k) or real(*a, **k))
    stand.runtime.voted = False
    stand.backend.init_forward_metadata(batch)
    assert case.error(stand.attend(batch), votes=None) < TOLERANCE
    assert case.votes[batch.out_cache_loc].eq(0).all(), "what it writes has one vote, all the same"
    stand.backend.init_forward_metadata(batch)
    assert case.error(stand.attend(batch)) < TOLERANCE
    assert [kwargs.get("score_mod") is not None for kwargs in passed] == [False, True]


def test_a_graph_reads_static_memory_only(stock_dtype, monkeypatch):
    """Captured once, replayed with another batch: the Python of forward_decode does not run again in a server, so all
    that changes must lie behind addresses that it recorded."""
    stand = Stand(Case([40, 60], heads=HEADS, dtype=stock_dtype), monkeypatch)
    backend, case, batch = stand.backend, stand.case, stand.batch()
    backend.init_cuda_graph_state(4, 4)
    addresses = (backend._graph_table.rows.data_ptr(), backend.layers._graph_rows.data_ptr())
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    seen = {}
    monkeypatch.setattr(backend, "decode_attention_fwd", lambda *a, **k: seen.update(args=a, kwargs=k))
    stand.attend(batch)  # capture
    (aux,) = seen["kwargs"]["aux_tensors"]
    assert stand.arena.queries[1, :8].isnan().all()  # nobody asked: all queries went to the spare row
    table = backend._graph_table.rows.clone()
    case.lens = torch.tensor([33, 20], device=DEVICE)
    stand.runtime.capture = (torch.tensor([1], device=DEVICE), torch.tensor([6], device=DEVICE))
    backend.init_forward_metadata(SimpleNamespace(**vars(batch)))  # an eager forward between replays
    stand.runtime.capture = (torch.tensor([1], device=DEVICE), torch.tensor([6], device=DEVICE))
    backend.init_forward_metadata_out_graph(batch)  # replay
    assert backend.layers.graph_rows.tolist() == [8, 6, 8, 8]
    assert torch.equal(backend._graph_table.rows, table)
    assert addresses == (backend._graph_table.rows.data_ptr(), backend.layers._graph_rows.data_ptr())
    out = torch.full_like(case.q, float("nan"))
    replayed = list(seen["args"])
    replayed[3] = out
    replayed[4], replayed[5] = backend.kv_indptr[:3], backend.cuda_graph_kv_indices
    decode_attention_fwd(*replayed, **seen["kwargs"] | {"aux_tensors": [aux]})
    assert case.error(out) < TOLERANCE


def test_a_graph_of_an_extend_and_a_second_score_mod_are_refused(stock_dtype, monkeypatch):
    stand = Stand(Case([40], [3], heads=HEADS, dtype=stock_dtype), monkeypatch)
    with pytest.raises(ConfigError, match="no CUDA graph of a EXTEND"):
        stand.backend.init_forward_metadata_out_graph(stand.batch())
    stand.backend.init_forward_metadata(stand.batch())
    with pytest.raises(ConfigError, match="score_mod of its own"):
        stand.backend.forward_extend(stand.case.q, None, None, stand.layer, stand.batch(), score_mod=len)
    stand.layer.logit_cap, stand.layer.layer_id = 30.0, FIRST
    with pytest.raises(ConfigError, match="soft-capping"):
        stand.attend(stand.batch())


def test_without_keepkv_it_is_the_stock_backend(stock_dtype, monkeypatch):
    stand = Stand(Case([40, 9], heads=HEADS, dtype=stock_dtype), monkeypatch)
    layers = stand.backend.layers
    layers.runtime = None
    stand.backend._attach(layers)
    stand.backend.init_forward_metadata(stand.batch())
    assert stand.case.error(stand.attend(stand.batch()), votes=None) < TOLERANCE


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    if INTERPRETED:  # a program takes 10 ms
        monkeypatch.setattr(triton_impl, "_DECODE_PROGRAMS", 16)


def packed_stand(news, dtype, monkeypatch):
    """Rows with spans and a row without; the new tokens' slots were parts of a span that is gone."""
    case = PackedCase([14, 9, 1], [[20, 3], [], [12]], news, heads=HEADS, dtype=dtype, layers=2)
    stand = Stand(PackedLayer(plain_new_tokens(case)), monkeypatch)
    written = stand.batch().out_cache_loc
    stand.runtime.cells.span_of[written] = 1
    return stand, written


@pytest.mark.parametrize("news", [None, [3, 9, 1]])
def test_a_forward_reads_packed_spans(news, stock_dtype, monkeypatch):
    stand, written = packed_stand(news, stock_dtype, monkeypatch)
    stand.backend.init_forward_metadata(stand.batch())
    packed = stand.runtime.cells.span_of.clone()
    stand.layer.layer_id = FIRST  # the first layer says that what is written is packed no longer
    stand.attend(stand.batch())
    assert stand.runtime.cells.span_of[written].eq(0).all()
    packed[written] = 0
    assert torch.equal(stand.runtime.cells.span_of, packed)
    stand.layer.layer_id = FIRST + 1
    assert stand.case.error(stand.attend(stand.batch())) < TOLERANCE


def test_where_nothing_is_packed_only_sglangs_kernels_run(stock_dtype, monkeypatch):
    stand, _ = packed_stand(None, stock_dtype, monkeypatch)
    monkeypatch.setattr(triton_packed, "decode", None)
    cells = stand.runtime.cells
    cells.span_of.zero_()
    cells._collect()
    stand.backend.init_forward_metadata(stand.batch())
    assert stand.backend._found is None and stand.attend(stand.batch()).isfinite().all()


def test_a_graph_follows_packed_spans(stock_dtype, monkeypatch):
    """Captured before anything is packed, as at a server's start, and for a row more than the batch will have; replayed
    after spans were made and their table has moved. What was recorded is called again with what it was called with."""
    stand, _ = packed_stand(None, stock_dtype, monkeypatch)
    backend, case, cells = stand.backend, stand.case, stand.runtime.cells
    numbers, free = cells.span_of.clone(), cells._free
    cells.span_of.zero_()
    cells._collect()
    backend.init_cuda_graph_state(4, 4)
    # What pads the batch is a row of one slot; that of the last row is part of a packed span.
    case.rows, case.q = (torch.cat([x, x[2:]]) for x in (case.rows, case.q))
    case.lens = torch.cat([case.lens, case.lens.new_ones(1)])
    assert numbers[case.slots(3)] != 0
    batch, recorded = stand.batch(), []
    batch.out_cache_loc[3] = next(s for s in range(1, len(numbers)) if not case.table.eq(s).any())
    for owner, name in ((backend, "decode_attention_fwd"), (triton_packed, "decode")):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, call=call, **kwargs: recorded.append((call, args, kwargs)))
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    out = stand.attend(batch)
    assert len(recorded) == 2
    address = cells._starts.data_ptr()
    cells.span_of[: len(free)] = torch.arange(1, len(free) + 1, dtype=torch.int32, device=DEVICE)
    cells._collect()
    cells.span_of.copy_(numbers)
    assert cells._starts.data_ptr() != address
    backend.init_forward_metadata_out_graph(batch)
    out.fill_(float("nan"))
    for call, args, kwargs in recorded:
        call(*args, **kwargs)
    assert error(case.packed, out[:3], 1) < TOLERANCE and out[3].isfinite().all()
