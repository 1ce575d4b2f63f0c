"""keepkv_flashinfer without a GPU: SGLang's real backend class and FlashInfer's real wrapper classes, with Python in
the place of the compiled module. It reads its arguments in the order that the compiled one has and computes Eq. 6."""

from __future__ import annotations

import contextlib
import functools
import inspect
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer")
import sglang.srt.layers.attention.flashinfer_backend as stock  # noqa: E402
from flashinfer.jit.attention import modules as jit  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from keepkv_sglang import runtime  # noqa: E402
from keepkv_sglang.backend import flashinfer as ours  # noqa: E402
from keepkv_sglang.config import ConfigError  # noqa: E402
from keepkv_sglang.kernels.attention import reference  # noqa: E402
from keepkv_sglang.votes import QueryArena, VoteStore  # noqa: E402

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


@pytest.fixture
def patched(monkeypatch):
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
            attach_model_runner=lambda _: None,
        )
        self.rt.arena.queries.zero_()
        for votes in self.rt.votes.log_votes:
            votes.copy_(torch.rand(votes.shape, generator=self.gen) * 4)
        patched.setattr(runtime, "configured", lambda: SimpleNamespace(enabled=enabled))
        patched.setattr(runtime, "current", lambda: self.rt)
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


def close(got, wanted):
    return bool(((got.double() - wanted).abs() <= TOLERANCE * wanted.abs().clamp_min(1e-3)).all())


@pytest.mark.parametrize(("heads", "kind"), [((6, 3), "decode"), ((4, 1), "prefill")])
def test_decode_is_equation_6(patched, heads, kind):
    """Group 2 runs on CUDA cores, group 4 on tensor cores, which is the prefill module."""
    server = Server(patched, heads)
    batch = server.batch([3, 0, 4], [40, 1, 58])
    for layer_id in range(LAYERS):
        assert close(*server.forward(batch, server.layer(layer_id)))
        assert server.rt.votes.log_votes[layer_id][batch.out_cache_loc].eq(0).all()  # rewritten slots
    (used,) = [m for m in Module.made if m.runs]
    assert used.kind == kind
    assert [r["log_votes"].data_ptr() for r in used.runs] == [v.data_ptr() for v in server.rt.votes.log_votes]
    assert server.rt.scales == {0: 0.3, 1: 0.3}


@pytest.mark.parametrize("news", [[5, 1, 20], [40, 1, 20]])
def test_extend_over_cached_tokens_reads_the_pool_with_votes(patched, news):
    server = Server(patched)
    assert close(*server.forward(server.batch([3, 0, 4], [40, 1, 58], news)))
    assert not server.backend.prefill_wrapper_ragged.calls
    (used,) = [m for m in Module.made if m.runs]
    assert used.runs[0]["mask_mode"] == 1  # causal, although SGLang plans without
    assert used.runs[0]["maybe_custom_mask"] is None


def test_extend_without_cached_tokens_stays_sglangs_ragged_path(patched):
    server = Server(patched)
    batch = server.batch([3, 0], [40, 7], [40, 7])
    assert close(*server.forward(batch))
    assert server.backend.prefill_wrapper_ragged.calls == 1 and not any(m.runs for m in Module.made)
    assert server.rt.votes.log_votes[0][batch.out_cache_loc].eq(0).all()
    assert close(*server.forward(server.batch([3, 0], [45, 7], [5, 7])))  # the next batch decides anew
    assert server.backend.prefill_wrapper_ragged.calls == 1


def test_the_fa3_experiment_gets_its_scalars(patched):
    patched.setenv(ours.FA3_FLAG, "1")
    server = Server(patched)
    assert close(*server.forward(server.batch([3, 0], [40, 7], [5, 7])))
    (used,) = [m for m in Module.made if m.runs]
    assert (used.backend, used.args[11], used.runs[0]["log_votes_heads"]) == ("fa3", "KeepKVAttentionSM90", 3)
    patched.setenv(ours.FA3_FLAG, "yes")
    with pytest.raises(ConfigError, match=ours.FA3_FLAG):
        Server(patched)


def test_scales_of_a_scaled_cache(patched):
    server = Server(patched)
    layer = server.layer(0, k_scale_float=0.5, v_scale_float=2.0)
    got, _ = server.forward(server.batch([1], [30]), layer)
    used = next(m for m in Module.made if m.runs).runs[0]
    assert used["sm_scale"] == pytest.approx(0.15)
    plain, _ = Server(patched).forward(server.batch([1], [30]), server.layer(0, scaling=0.15))
    assert torch.allclose(got.float(), 2 * plain.float(), rtol=2**-7)


def test_window_queries_are_kept(patched):
    server = Server(patched)
    server.rt.capture = (torch.tensor([3, 5]), torch.tensor([7, 2]))
    server.forward(server.batch([3, 0], [40, 7], [5, 7]))
    assert server.rt.capture is None
    assert torch.equal(server.rt.arena.queries[0][[7, 2]], server.q[[3, 5]])
    before = server.rt.arena.queries.clone()
    server.forward(server.batch([3, 0], [41, 8]))
    assert torch.equal(server.rt.arena.queries, before)


@pytest.mark.parametrize("heads", [(6, 3), (4, 1)], ids=["cuda cores", "tensor cores"])
def test_a_decode_graph_keeps_queries_and_votes_at_fixed_addresses(patched, heads):
    server = Server(patched, heads)
    backend, arena = server.backend, server.rt.arena
    backend.init_cuda_graph_state(4, 4)
    batch = server.batch([3, 0], [40, 7])
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    rows = backend.layers.graph_rows
    assert rows.tolist() == [arena.spare] * 4
    wrapper = backend.decode_cuda_graph_metadata[2][0]
    assert wrapper.is_cuda_graph_enabled and wrapper._jit_module is not None
    assert wrapper.begin_forward.func is flashinfer.fast_decode_plan
    assert close(*server.forward(batch, plan=False))  # what capture records
    server.rt.capture = (torch.tensor([1]), torch.tensor([5]))
    later = server.batch([3, 0], [41, 8])
    backend.init_forward_metadata_out_graph(later)  # a replay: plans anew, and says where its queries go
    assert backend.layers.graph_rows.data_ptr() == rows.data_ptr()
    assert rows.tolist() == [arena.spare, 5, arena.spare, arena.spare]
    assert close(*server.forward(later, plan=False))  # stands for the replay
    assert torch.equal(arena.queries[0, 5], server.q[1])
    backend.init_forward_metadata(later)
    assert backend.layers.graph_rows is None


@pytest.mark.parametrize("graph", [False, True])
def test_a_custom_mask_and_votes_combine(patched, graph):
    """KeepKV refuses what uses it (speculative decoding); the wrapper's masks still have to be right."""
    server = Server(patched)
    backend = server.backend
    backend.init_cuda_graph_state(2, 64)
    (wrapper,) = backend._create_prefill_wrappers(2, True) if graph else backend.prefill_wrappers_verify
    news, lens = [3, 5], [11, 20]
    slots = [server.table[r, :n] for r, n in zip((3, 1), lens, strict=True)]
    masks = [torch.rand(c, n, generator=server.gen) < 0.5 for c, n in zip(news, lens, strict=True)]
    masks = [m.index_fill(1, torch.tensor([0]), True) for m in masks]
    indptr = [torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (news, lens)]
    wrapper.begin_forward(
        *indptr, torch.cat(slots), torch.ones(2, dtype=torch.int32), 6, 3, DIM, 1, q_data_type=DTYPE,
        kv_data_type=DTYPE, custom_mask=torch.cat([m.reshape(-1) for m in masks]),
    )  # fmt: skip
    q = torch.randn(8, 6, DIM, generator=server.gen).to(DTYPE)
    votes = server.rt.votes.log_votes[1]
    got = wrapper.run(q, server.pool.get_kv_buffer(1), votes, 0.3)
    k, v = server.pool.get_kv_buffer(1)
    wanted = [
        reference.attend(part.double(), k[s.long()], v[s.long()], votes[s.long()], m, 0.3)
        for part, s, m in zip(q.split(news), slots, masks, strict=True)
    ]
    assert close(got, torch.cat(wanted))


def test_with_keepkv_off_it_is_sglangs_backend(patched):
    server = Server(patched, enabled=False)
    assert server.backend.runtime is None
    assert all(w._jit_module is None for w in (*server.backend.decode_wrappers, *server.backend.prefill_wrappers_paged))
    assert not Module.made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window_size": 128}, "sliding window"),
        ({"kv_cache_dtype": torch.float16}, "kv-cache-dtype auto"),
        ({"dtype": torch.float32, "kv_cache_dtype": torch.float32}, "float32"),
    ],
)
def test_what_it_does_not_compute_is_refused(patched, change, message):
    with pytest.raises(ConfigError, match=message):
        Server(patched, **change)


def test_full_prefill_graphs_and_odd_layers_are_refused(patched):
    server = Server(patched)
    with pytest.raises(ConfigError, match="cuda-graph-backend-prefill"):
        server.backend._create_full_cg_prefill_wrappers(1, 64)
    with pytest.raises(ConfigError, match="soft-capping"):
        server.forward(server.batch([1], [30]), server.layer(0, logit_cap=30.0))


def test_it_is_registered_with_sglang(patched):
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    from keepkv_sglang import plugin

    patched.setattr(Engine, "server_args_class", Engine.server_args_class)

    def register(name):
        return functools.partial(made.__setitem__, name)

    made, choices = {}, list(ATTENTION_BACKEND_CHOICES)
    patched.setattr(plugin.seams, "HOOKS", ())  # this process is no server
    patched.setattr(attention_registry, "register_attention_backend", register)
    ATTENTION_BACKEND_CHOICES[:] = [name for name in choices if not name.startswith("keepkv")]
    try:
        plugin.register()
        assert {"keepkv_cpu", "keepkv_flashinfer"} <= set(ATTENTION_BACKEND_CHOICES)
    finally:
        ATTENTION_BACKEND_CHOICES[:] = choices
    patched.setattr(ours, "KeepKVFlashInferBackend", lambda runner: ("built", runner))
    assert made["keepkv_flashinfer"](7) == ("built", 7)


def test_wrappers_take_the_arguments_we_pass():
    """Against the installed FlashInfer: names of the constructors, and that run takes votes positionally."""
    for name, method in (("Decode", "_decode_wrapper"), ("Prefill", "_prefill_wrapper")):
        cls = getattr(flashinfer, f"Batch{name}WithPagedKVCacheWrapper")
        assert {"backend", "jit_args", "use_cuda_graph"} <= set(inspect.signature(cls.__init__).parameters)
        parameters = inspect.signature(cls.run).parameters
        assert list(parameters)[:4] == ["self", "q", "paged_kv_cache", "args"]
        assert parameters["args"].kind is inspect.Parameter.VAR_POSITIONAL and "v_scale" in parameters
        assert callable(getattr(ours.KeepKVFlashInferBackend, method))
    assert "causal" in inspect.signature(flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan).parameters
