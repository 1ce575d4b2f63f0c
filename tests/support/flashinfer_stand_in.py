"""SGLang's real FlashInfer backend and FlashInfer's real wrapper classes on a CPU, with Python in the place of the
compiled module. It reads its arguments in the order that the compiled one has and computes Eq. 6."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import ClassVar

import flashinfer
import sglang.srt.layers.attention.flashinfer_backend as stock
import torch
from flashinfer.jit.attention import modules as jit
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from keepkv_sglang.backend import common
from keepkv_sglang.backend import flashinfer as ours
from keepkv_sglang.kernels.attention import reference
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.runtime import attach, process

DIM, SLOTS, LAYERS, DTYPE = 64, 300, 2, torch.bfloat16
TOLERANCE = 2.0**-8  # relative, of the output's rounding to bfloat16; the stand-in computes in float64


def _on_cpu(make):
    def build(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return staticmethod(build)


class OnCpu:
    """torch for SGLang's and FlashInfer's files: their fixed "cuda" is the CPU here, and nothing is pinned."""

    empty, zeros, full, ones = (_on_cpu(make) for make in (torch.empty, torch.zeros, torch.full, torch.ones))
    cuda = SimpleNamespace(device=lambda _: contextlib.nullcontext())

    def __getattr__(self, name):
        return getattr(torch, name)


class Module:
    """What FlashInfer would compile from jit_args: plan, and run with the arguments of the generated C++ function."""

    made: ClassVar[list[Module]] = []

    def __init__(self, kind, args, backend):
        self.kind, self.args, self.backend, self.plans, self.runs = kind, args, backend, [], []
        self.made.append(self)

    def plan(self, *args):
        # decode.py and prefill.py: 15 arguments for decode, 16 for FA3, 20 for FA2.
        assert len(args) == {"decode": 15, "fa2": 20, "fa3": 16}[self.kind if self.kind == "decode" else self.backend]
        self.plans.append(args)
        return [len(self.plans)]

    def run(self, _f, _i, _plan, q, k, v, indptr, indices, last, out, lse, layout, window, pdl, *extra):
        self._attend(q, k, v, torch.arange(len(indptr)), indptr, indices, out, 0, extra)

    def paged_run(self, _f, _i, _plan, q, k, v, qo, indptr, indices, last, out, lse, mask, layout, window, pdl, *extra):
        self._attend(q, k, v, qo, indptr, indices, out, mask, extra)

    ragged_run = None

    def _attend(self, q, k, v, qo, indptr, indices, out, mask_mode, extra):
        names = [*self.args[7], *self.args[9]]
        assert len(extra) == len(names)
        given = dict(zip(names, extra, strict=True))
        votes = given["log_votes"]
        assert votes.dtype == torch.float32 and votes.is_contiguous() and votes.shape == (k.shape[0], k.shape[2])
        assert isinstance(given["sm_scale"], float) and k.shape[1] == v.shape[1] == 1
        assert given.get("log_votes_heads", k.shape[2]) == k.shape[2]
        self.runs.append({**given, "mask_mode": mask_mode})
        for b in range(len(indptr) - 1):
            slots = indices[indptr[b] : indptr[b + 1]].long()
            queries = q[qo[b] : qo[b + 1]].double()
            new, length = len(queries), len(slots)
            visible = torch.ones(new, length, dtype=torch.bool)
            if mask_mode == 1:
                visible = torch.arange(length)[None] <= torch.arange(length - new, length)[:, None]
            if mask_mode == 2:
                packed = given["maybe_custom_mask"][int(given["maybe_mask_indptr"][b]) :]
                bits = (packed[: -(-new * length // 8), None] >> torch.arange(8)) & 1
                visible = bits.reshape(-1)[: new * length].bool().view(new, length)
            done = reference.attend(queries, k[slots, 0], v[slots, 0], votes[slots], visible, given["sm_scale"])
            out[qo[b] : qo[b + 1]] = done.to(out.dtype)


class Ragged:
    """SGLang's third wrapper, which stays SGLang's: plain causal attention of new tokens among themselves."""

    def __init__(self, *_, **__):
        self.calls = 0

    def begin_forward(self, qo, kv, *_, **__):
        self.qo = qo.clone()

    def forward(self, q, k, v, causal, sm_scale, logits_soft_cap):
        self.calls += 1
        out = torch.empty_like(q)
        for a, b in zip(self.qo[:-1].tolist(), self.qo[1:].tolist(), strict=True):
            visible = torch.ones(b - a, b - a, dtype=torch.bool).tril() if causal else None
            out[a:b] = reference.attend(q[a:b].double(), k[a:b], v[a:b], None, visible, sm_scale).to(q.dtype)
        return out


def fake(generate, kind):
    """Stands for FlashInfer's gen_customize_*: checks jit_args against its signature, returns a Module."""

    def make(*args, **kwargs):
        bound = inspect.signature(generate).bind(*args, **kwargs).arguments
        backend = bound.get("backend", "fa2")
        names = (bound["additional_tensor_names"], bound["additional_tensor_dtypes"])
        assert len(names[0]) == len(names[1]) and bound["variant_name"].split("<")[0] in bound["variant_decl"]
        # One name for one module: decode and prefill, with their own texts and tensors, must not share a build folder.
        assert bound["uri"].split("_")[1] == (kind if backend == "fa2" else backend)
        if kind == "prefill" and backend == "fa2":
            assert "use_custom_mask" in bound["variant_name"] and bound["paged_kv_stride_mode"] == "equal"
        jit_args = list(args[1:] if kind == "prefill" else args)
        return SimpleNamespace(build_and_load=lambda: Module(kind, jit_args, backend))

    return make


def pack(x, indptr, bitorder):
    """segment_packbits, a CUDA kernel of FlashInfer's: every segment starts at a byte."""
    assert bitorder == "little"
    parts = []
    for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True):
        bits = torch.zeros(-(-(b - a) // 8) * 8, dtype=torch.uint8)
        bits[: b - a] = x[a:b].to(torch.uint8)
        parts.append((bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8))
    starts = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0).to(torch.int32)
    return torch.cat(parts), starts


def patch(monkeypatch):
    Module.made.clear()
    for module in (flashinfer.decode, flashinfer.prefill, stock):
        monkeypatch.setattr(module, "torch", OnCpu())
    decode, prefill = (
        fake(jit.gen_customize_batch_decode_module, "decode"),
        fake(jit.gen_customize_batch_prefill_module, "prefill"),
    )
    monkeypatch.setattr(flashinfer.decode, "gen_customize_batch_decode_module", decode)
    monkeypatch.setattr(flashinfer.decode, "gen_customize_batch_prefill_module", prefill)
    monkeypatch.setattr(flashinfer.prefill, "gen_customize_batch_prefill_module", prefill)
    uncached = flashinfer.prefill.get_customize_batch_prefill_module.__wrapped__  # a module per test
    monkeypatch.setattr(flashinfer.prefill, "get_customize_batch_prefill_module", uncached)
    monkeypatch.setattr(flashinfer.prefill, "segment_packbits", pack)
    for name in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper", "fast_decode_plan"):
        monkeypatch.setattr(stock, name, getattr(flashinfer, name), raising=False)
    monkeypatch.setattr(stock, "BatchPrefillWithRaggedKVCacheWrapper", Ragged, raising=False)
    monkeypatch.setattr(stock, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dcp_size=1))
    execution = SimpleNamespace(
        features=SimpleNamespace(enable_mis=False),
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
    )
    monkeypatch.setattr(stock, "get_exec", lambda: execution)
    monkeypatch.setattr(stock, "get_platform", lambda: SimpleNamespace(is_sm100=False))
    monkeypatch.setattr(stock, "get_buffer", lambda _name, make: make())
    monkeypatch.setattr(stock, "get_cuda_graph_max_batch_size", lambda size: size)
    monkeypatch.setattr(stock, "is_in_tc_piecewise_cuda_graph", lambda: False)
    monkeypatch.setattr(stock.DllmConfig, "from_server_args", staticmethod(lambda _: None))
    monkeypatch.setattr(stock.envs.SGLANG_FLASHINFER_WORKSPACE_SIZE, "get", lambda: 1 << 12)
    return monkeypatch


class Server:
    """One backend over a pool with random K, V and votes; the rows of requests lie scattered over the slots."""

    def __init__(self, patched, heads=(6, 3), enabled=True, **runner):
        self.heads, self.gen = heads, torch.Generator().manual_seed(1)
        hq, hkv = heads
        self.pool = MHATokenToKVPool(SLOTS - 1, 1, DTYPE, hkv, DIM, LAYERS, "cpu", False, enable_alt_stream=False)
        for layer in range(LAYERS):
            for buffer in (self.pool.get_key_buffer(layer), self.pool.get_value_buffer(layer)):
                buffer.copy_(torch.randn(buffer.shape, generator=self.gen))
        self.rt = SimpleNamespace(
            votes=VoteStore(LAYERS, SLOTS, hkv, "cpu"),
            arena=QueryArena(LAYERS, 8, hq, DIM, DTYPE, "cpu"),
            scales={},
            first_layer=0,
            capture=None,
            readings=[],
            voted=True,
        )
        self.rt.arena.queries.zero_()
        for votes in self.rt.votes.log_votes:
            votes.copy_(torch.rand(votes.shape, generator=self.gen) * 4)
        patched.setattr(process, "configured", lambda: SimpleNamespace(enabled=enabled))
        patched.setattr(process, "current", lambda: self.rt)
        patched.setattr(attach, "model_runner", lambda *_, **__: None)
        patched.setattr(common, "get_parallel", lambda: SimpleNamespace(attn_tp_rank=0, attn_tp_size=1))
        self.table = torch.randperm(SLOTS - 1, generator=self.gen)[:290].view(5, 58).to(torch.int32) + 1
        config = SimpleNamespace(
            num_attention_heads=hq, get_num_kv_heads=lambda *_: hkv, get_max_num_attention_heads=lambda: hq,
            head_dim=DIM, v_head_dim=DIM, context_len=64, is_multimodal=False, is_encoder_decoder=False,
            hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        )  # fmt: skip
        runner_values = dict(
            token_to_kv_pool=self.pool, req_to_token_pool=SimpleNamespace(req_to_token=self.table, size=5),
            kv_index_translator=SimpleNamespace(pack_read_stream=self._indices, reads_are_translated=False),
            server_args=SimpleNamespace(), model_config=config, kv_cache_dtype=DTYPE, dtype=DTYPE, device="cpu",
            prefill_attention_backend_str="keepkv_flashinfer", decode_attention_backend_str="keepkv_flashinfer",
            page_size=1, sliding_window_size=None, is_draft_worker=False, init_new_workspace=False,
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: self.pool),
        )  # fmt: skip
        self.backend = ours.KeepKVFlashInferBackend(SimpleNamespace(**{**runner_values, **runner}))

    def _indices(self, _plan, *, req_pool_indices, seq_lens, indptr, out, kv_start_idx, kind):
        for b, row in enumerate(req_pool_indices.tolist()):
            start, stop = indptr[b], indptr[b + 1]
            out[start:stop] = self.table[row, : stop - start]

    def layer(self, layer_id, **values):
        hq, hkv = self.heads
        fields = dict(
            layer_id=layer_id, tp_q_head_num=hq, tp_k_head_num=hkv, tp_v_head_num=hkv, head_dim=DIM, qk_head_dim=DIM,
            v_head_dim=DIM, scaling=0.3, logit_cap=0.0, sliding_window_size=-1, is_cross_attention=False,
            attn_type=SimpleNamespace(name="DECODER"), k_scale=None, v_scale=None, k_scale_float=None,
            v_scale_float=None, k_head_num=hkv,
        )  # fmt: skip
        return SimpleNamespace(**{**fields, **values})

    def batch(self, rows, lens, news=None):
        """news None: decode. The last token of each row (the last news[i]) is written by the forward."""
        counts = news or [1] * len(rows)
        lens_cpu = torch.tensor(lens)
        where = [self.table[r, n - c : n] for r, n, c in zip(rows, lens, counts, strict=True)]
        prefix = [n - c for n, c in zip(lens, counts, strict=True)]
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE if news is None else ForwardMode.EXTEND,
            req_pool_indices=torch.tensor(rows), seq_lens=lens_cpu.clone(), seq_lens_cpu=lens_cpu,
            seq_lens_sum=sum(lens), encoder_lens=None, spec_info=None, kv_loc_plan=None, batch_size=len(rows),
            out_cache_loc=torch.cat(where).long(), out_cache_loc_is_physical=False, positions=torch.zeros(sum(counts)),
            extend_prefix_lens=torch.tensor(prefix), extend_prefix_lens_cpu=prefix, extend_seq_lens_cpu=counts,
            cross_attention_custom_mask=None,
        )  # fmt: skip

    def forward(self, batch, layer=None, plan=True):
        """Runs one layer; returns its output and what the reference says, both [tokens, Hq, D]."""
        layer = layer or self.layer(0)
        tokens, (hq, hkv) = len(batch.out_cache_loc), self.heads
        q, k, v = (torch.randn(tokens, h * DIM, generator=self.gen).to(DTYPE) for h in (hq, hkv, hkv))
        if plan:
            self.backend.init_forward_metadata(batch)
        decode = batch.forward_mode.is_decode()
        run = self.backend.forward_decode if decode else self.backend.forward_extend
        got = run(q, k.view(-1, hkv, DIM), v.view(-1, hkv, DIM), layer, batch).view(-1, hq, DIM)
        slots = batch.out_cache_loc
        assert torch.equal(self.pool.get_key_buffer(layer.layer_id)[slots], k.view(-1, hkv, DIM))
        assert torch.equal(self.pool.get_value_buffer(layer.layer_id)[slots], v.view(-1, hkv, DIM))
        votes = self.rt.votes.log_votes[layer.layer_id] if self.backend.runtime else None
        wanted = torch.empty(got.shape, dtype=torch.float64)
        pools = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        news = batch.seq_lens - batch.extend_prefix_lens
        q3 = q.view(-1, hq, DIM)
        reference.extend(
            q3.double(), *pools, votes, self.table, batch.req_pool_indices, batch.seq_lens, news, layer.scaling, wanted
        )
        self.q = q3
        return got, wanted
