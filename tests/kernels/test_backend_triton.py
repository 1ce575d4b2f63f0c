"""keepkv_sglang/backend/triton.py with a stand-in for SGLang's model runner: its own kernels, metadata made by hand.

SGLang's metadata, KV writes and CUDA graphs are not run here; what is tested is what our class adds to them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.paged import DEVICE, TOLERANCE, Case, clean, ragged

pytest.importorskip("sglang")  # scripts/gpu_check.sh runs where it may be missing

from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
from sglang.srt.layers.attention import triton_backend
from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from keepkv_sglang.backend.common import VoteLayers
from keepkv_sglang.backend.triton import KeepKVTritonBackend
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.settings.config import ConfigError

LAYERS, HEADS, SPLITS, FIRST = 2, (6, 2), 2, 3


class Stand:
    """A backend over one Case: layer FIRST + 1 uses the case's pool and votes."""

    def __init__(self, case, monkeypatch):
        self.case = clean(case)
        dim = case.q.shape[2]
        self.votes = VoteStore(LAYERS, len(case.k), HEADS[1], DEVICE)
        self.votes.log_votes[1].copy_(case.votes)
        case.votes = self.votes.log_votes[1]
        self.arena = QueryArena(LAYERS, 8, HEADS[0], dim, case.q.dtype, DEVICE)
        self.arena.queries.fill_(float("nan"))
        self.runtime = SimpleNamespace(
            votes=self.votes, arena=self.arena, scales={}, first_layer=FIRST, capture=None, readings=[]
        )
        layers = object.__new__(VoteLayers)
        layers.runtime, layers.capture, layers._checked = self.runtime, None, set()
        layers.graph_rows = layers._graph_rows = None
        backend = self.backend = object.__new__(KeepKVTritonBackend)
        pool = SimpleNamespace(get_key_buffer=lambda _: case.k, get_value_buffer=lambda _: case.v)
        vars(backend).update(
            dcp_size=1, num_head=HEADS[0], num_kv_head=HEADS[1], device=DEVICE, page_size=1, use_mla=False,
            use_pdl=False, is_draft_runner=False, enable_deterministic=False, enable_lean_attention=False,
            max_kv_splits=SPLITS, token_to_kv_pool=pool, decode_attention_fwd=decode_attention_fwd,
            extend_attention_fwd=extend_attention_fwd, allow_bidirectional_attention_in_extend=False,
            use_verify_shared_kv=False, use_verify_splitkv=False, use_dense_fp8_chunked_prefill=False, _in_graph=False,
        )  # fmt: skip
        backend._attach(layers)
        # SGLang's metadata, made here; a graph's lives in static buffers that replays fill.
        monkeypatch.setattr(TritonAttnBackend, "init_forward_metadata", lambda b, _: self.metadata(b))
        monkeypatch.setattr(TritonAttnBackend, "init_forward_metadata_out_graph", lambda b, *_: self.graph_metadata(b))
        monkeypatch.setattr(TritonAttnBackend, "init_cuda_graph_state", lambda b, *_: self.graph_state(b))
        monkeypatch.setattr(triton_backend, "KVWriteLoc", None)
        self.layer = SimpleNamespace(
            layer_id=FIRST + 1, tp_q_head_num=HEADS[0], tp_k_head_num=HEADS[1], qk_head_dim=dim, v_head_dim=dim,
            head_dim=dim, scaling=case.scale, logit_cap=0.0, logit_capping_method="tanh", sliding_window_size=-1,
            is_cross_attention=False, attn_type=AttentionType.DECODER, xai_temperature_len=-1, k_scale=None,
            v_scale=None,
        )  # fmt: skip

    def metadata(self, backend):
        case, fields = self.case, dict.fromkeys(ForwardMetadata.__dataclass_fields__)
        if case.news is None:
            indptr, indices = ragged(case.table, case.rows, case.lens)
            backend.forward_metadata = ForwardMetadata(
                **fields | self.scratch() | dict(kv_indptr=indptr, kv_indices=indices)
            )
            return
        indptr, indices = ragged(case.table, case.rows, case.lens - case.news)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=DEVICE), case.news.cumsum(0)])
        more = dict(kv_indptr=indptr, kv_indices=indices, qo_indptr=starts, max_extend_len=int(case.news.max()))
        backend.forward_metadata = ForwardMetadata(**fields | more)

    def scratch(self):
        n, dim = len(self.case.lens), self.case.q.shape[2]
        return dict(
            attn_logits=torch.full((n, HEADS[0], SPLITS, dim), float("nan"), device=DEVICE),
            attn_lse=torch.full((n, HEADS[0], SPLITS), float("nan"), device=DEVICE),
            num_kv_splits=torch.full((n,), SPLITS, dtype=torch.int32, device=DEVICE),
        )

    def graph_state(self, backend):
        backend.kv_indptr = torch.zeros(5, dtype=torch.int32, device=DEVICE)
        backend.cuda_graph_kv_indices = torch.zeros(1000, dtype=torch.int64, device=DEVICE)

    def graph_metadata(self, backend):
        case = self.case
        if case.news is not None:
            return
        indptr, indices = ragged(case.table, case.rows, case.lens)
        backend.kv_indptr[: len(indptr)], backend.cuda_graph_kv_indices[: len(indices)] = indptr, indices
        static = dict(kv_indptr=backend.kv_indptr[: len(indptr)], kv_indices=backend.cuda_graph_kv_indices)
        fields = dict.fromkeys(ForwardMetadata.__dataclass_fields__)
        backend.forward_metadata = ForwardMetadata(**fields | self.scratch() | static)

    def batch(self):
        case, news = self.case, self.case.news
        last = [1] * len(case.lens) if news is None else news.tolist()
        slots = torch.cat([case.slots(i)[len(case.slots(i)) - n :] for i, n in enumerate(last)])
        mode = ForwardMode.DECODE if news is None else ForwardMode.EXTEND
        return SimpleNamespace(
            forward_mode=mode, out_cache_loc=slots, positions=slots, spec_info=None, seq_lens_sum=int(case.lens.sum()),
            batch_size=len(case.lens), mha_one_shot=False, attn_attend_prefix_cache=False, extend_seq_lens_cpu=None,
        )  # fmt: skip

    def attend(self, batch):
        case = self.case
        q, k, v = case.q.flatten(1), case.k[batch.out_cache_loc], case.v[batch.out_cache_loc]
        call = self.backend.forward_decode if case.news is None else self.backend.forward_extend
        return call(q, k, v, self.layer, batch, save_kv_cache=False).view_as(case.q)


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
