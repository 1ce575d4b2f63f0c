"""keepkv_flashinfer without a GPU, on the stand-in of flashinfer_stand_in.py."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer")
from keepkv_sglang.backend import flashinfer as ours  # noqa: E402
from keepkv_sglang.kernels.attention import reference  # noqa: E402
from keepkv_sglang.settings.config import ConfigError  # noqa: E402
from tests.support.flashinfer_stand_in import DIM, DTYPE, LAYERS, TOLERANCE, Module, Server, patch  # noqa: E402


@pytest.fixture
def patched(monkeypatch):
    return patch(monkeypatch)


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
