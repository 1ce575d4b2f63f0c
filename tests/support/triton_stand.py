"""keepkv_sglang/backend/triton.py with a stand-in for SGLang's model runner: its own kernels, metadata made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
from sglang.srt.layers.attention import triton_backend
from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from keepkv_sglang.backend.common import VoteLayers
from keepkv_sglang.backend.triton import KeepKVTritonBackend
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.cells import PackedCells
from keepkv_sglang.memory.votes import VoteStore
from tests.support.packed_stock import PackedStock, error
from tests.support.paged import DEVICE, clean, ragged

LAYERS, HEADS, SPLITS, FIRST = 2, (6, 2), 2, 3


class PackedLayer:
    """Layer 1 of a PackedCase of LAYERS layers, as Stand uses a Case."""

    def __init__(self, case):
        stock = PackedStock(case)  # on the device
        self.packed, self.layers, self.scale, self.news = case, stock.layers, case.scale, stock.news
        self.table, self.rows, self.lens, self.q = stock.table, stock.rows, stock.lens, stock.q
        self.k, self.v, self.votes = stock.layers.keys[1], stock.layers.values[1], stock.layers.log_votes[1]

    def slots(self, i):
        return self.table[self.rows[i], : self.lens[i]].long()

    def error(self, out):
        return error(self.packed, out, 1)

    def cells(self, votes):
        """What a server knows of the packed spans."""
        for own, pool in zip(self.layers.log_votes, votes, strict=True):
            pool.copy_(own)
        found, packed = PackedCells.of(self.layers.keys, self.layers.values, votes), self.packed
        for number, start in packed.starts.items():
            ((row, _), *_) = (packed.span_of[packed.table.clamp(min=0)] == number).nonzero().tolist()
            line = packed.table[row].clamp(min=0).long()
            found.add(line[packed.span_of[line] == number].to(DEVICE), start.diff().view(LAYERS, -1))
        return found


class Stand:
    """A backend over one Case: layer FIRST + 1 uses the case's pool and votes. Or over one PackedLayer."""

    def __init__(self, case, monkeypatch):
        packed = isinstance(case, PackedLayer)
        self.case = case if packed else clean(case)
        dim = case.q.shape[2]
        self.votes = VoteStore(LAYERS, len(case.k), HEADS[1], DEVICE)
        self.votes.log_votes[1].copy_(case.votes)
        case.votes = self.votes.log_votes[1]
        cells = case.cells(self.votes.log_votes) if packed else None
        self.arena = QueryArena(LAYERS, 8, HEADS[0], dim, case.q.dtype, DEVICE)
        self.arena.queries.fill_(float("nan"))
        self.runtime = SimpleNamespace(
            votes=self.votes,
            arena=self.arena,
            scales={},
            first_layer=FIRST,
            capture=None,
            readings=[],
            cells=cells,
            voted=True,
        )
        layers = object.__new__(VoteLayers)
        layers.runtime, layers.capture, layers._checked = self.runtime, None, set()
        layers.graph_rows = layers._graph_rows = None
        backend = self.backend = object.__new__(KeepKVTritonBackend)
        pool = SimpleNamespace(get_key_buffer=lambda _: case.k, get_value_buffer=lambda _: case.v)
        vars(backend).update(
            dcp_size=1, num_head=HEADS[0], num_kv_head=HEADS[1], device=DEVICE, page_size=1, use_mla=False,
            use_pdl=False, is_draft_runner=False, enable_deterministic=False, enable_lean_attention=False,
            max_kv_splits=SPLITS, token_to_kv_pool=pool, req_to_token=case.table,
            decode_attention_fwd=decode_attention_fwd,
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

    def scratch(self, n=None):
        n, dim = n or len(self.case.lens), self.case.q.shape[2]
        return dict(
            attn_logits=torch.full((n, HEADS[0], SPLITS, dim), float("nan"), device=DEVICE),
            attn_lse=torch.full((n, HEADS[0], SPLITS), float("nan"), device=DEVICE),
            num_kv_splits=torch.full((n,), SPLITS, dtype=torch.int32, device=DEVICE),
        )

    def graph_state(self, backend):
        backend.kv_indptr = torch.zeros(5, dtype=torch.int32, device=DEVICE)
        backend.cuda_graph_kv_indices = torch.zeros(1000, dtype=torch.int64, device=DEVICE)
        self.static = self.scratch(5)
        backend.cuda_graph_attn_lse = self.static["attn_lse"]

    def graph_metadata(self, backend):
        case = self.case
        if case.news is not None:
            return
        indptr, indices = ragged(case.table, case.rows, case.lens)
        backend.kv_indptr[: len(indptr)], backend.cuda_graph_kv_indices[: len(indices)] = indptr, indices
        static = dict(kv_indptr=backend.kv_indptr[: len(indptr)], kv_indices=backend.cuda_graph_kv_indices)
        fields = dict.fromkeys(ForwardMetadata.__dataclass_fields__)
        backend.forward_metadata = ForwardMetadata(**fields | self.static | static)

    def batch(self):
        case, news = self.case, self.case.news
        last = [1] * len(case.lens) if news is None else news.tolist()
        slots = torch.cat([case.slots(i)[len(case.slots(i)) - n :] for i, n in enumerate(last)])
        mode = ForwardMode.DECODE if news is None else ForwardMode.EXTEND
        return SimpleNamespace(
            forward_mode=mode, out_cache_loc=slots, positions=slots, spec_info=None, seq_lens_sum=int(case.lens.sum()),
            req_pool_indices=case.rows, seq_lens=case.lens,
            extend_prefix_lens=None if news is None else case.lens - news,
            batch_size=len(case.lens), mha_one_shot=False, attn_attend_prefix_cache=False, extend_seq_lens_cpu=None,
        )  # fmt: skip

    def attend(self, batch):
        case = self.case
        q, k, v = case.q.flatten(1), case.k[batch.out_cache_loc], case.v[batch.out_cache_loc]
        call = self.backend.forward_decode if case.news is None else self.backend.forward_extend
        return call(q, k, v, self.layer, batch, save_kv_cache=False).view_as(case.q)
