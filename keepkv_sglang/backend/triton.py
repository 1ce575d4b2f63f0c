"""SGLang attention backend for GPUs: SGLang's own Triton kernels, with votes through their score_mod.

Everything but the votes is SGLang's TritonAttnBackend: metadata, splits, page tables, CUDA graphs. Per forward we point
a table of addresses (kernels/attention/triton_score_mod.py) at the metadata that the kernels will read, and per layer
pass it along. Without --enable-keepkv it is the stock Triton backend.

CUDA graphs record addresses and replay no Python. So there are two tables: one for eager forwards, rewritten by each,
and one for graphs, pointed once at SGLang's static buffers, which every graph reads. What `VoteLayers.before` does in
Python is recorded with the graph: votes of SGLang's static out_cache_loc are reset, and the query of every row is
copied to the arena row that VoteLayers.graph_rows names, the spare one for nobody.

The kernels have run on a GPU, in CUDA graphs too (docs/gpu.md); this class has not: its bookkeeping is tested with
stand-ins (tests/kernels/test_backend_triton.py).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from keepkv_sglang.backend.common import VoteLayers
from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, requests_of_tokens, vote_score_mod
from keepkv_sglang.settings.config import ConfigError


class KeepKVTritonBackend(TritonAttnBackend):
    """TritonAttnBackend whose decode and extend weight attention by votes, and which keeps window queries."""

    # Our hooks read the batch's lengths on the host (hooks/extend.py).
    needs_cpu_seq_lens = True

    def __init__(self, model_runner: Any, **kwargs: Any) -> None:
        """ConfigError with decode context parallelism, RuntimeError when KeepKV's hooks did not run."""
        super().__init__(model_runner, **kwargs)
        self._attach(VoteLayers(model_runner))

    def _attach(self, layers: VoteLayers) -> None:
        """Makes the tables' static memory, before SGLang captures anything."""
        self.layers = layers
        self._eager_table = self._graph_table = None
        if layers.runtime is None:
            return
        if self.dcp_size > 1:
            raise ConfigError("SGLang's Triton kernels take no score_mod with decode context parallelism: --dcp-size 1")
        self._group = self.num_head // self.num_kv_head
        self._eager_table = VoteTable(layers.runtime.votes.log_votes, self._group)
        self._graph_table = VoteTable(layers.runtime.votes.log_votes, self._group)

    # -- metadata -----------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """An eager forward: SGLang's metadata, then the table points at it."""
        super().init_forward_metadata(forward_batch)
        self.layers.begin()
        if self._eager_table is None:
            return
        metadata, requests = self.forward_metadata, None
        if not forward_batch.forward_mode.is_decode_or_idle():
            requests = requests_of_tokens(metadata.qo_indptr, forward_batch.positions.numel())
        self._eager_table.point(metadata.kv_indptr, metadata.kv_indices, requests)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """SGLang's static buffers, and a table that points at them for good."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args, **kwargs)
        if self._graph_table is None or self.layers.runtime is None:
            return
        # Graphs of smaller batches read prefixes of kv_indptr: the same address.
        self._graph_table.point(self.kv_indptr, self.cuda_graph_kv_indices)
        self.layers.allocate_graph_rows(max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph is captured or replayed: SGLang's static metadata, and where each row's query goes.

        ConfigError for a graph of anything but a decode, whose tables nobody would fill.
        """
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if self.layers.runtime is None:
            return
        if not forward_batch.forward_mode.is_decode_or_idle():
            raise ConfigError(f"KeepKV has no CUDA graph of a {forward_batch.forward_mode.name} forward")
        self.layers.begin_graph()

    # -- attention ----------------------------------------------------------------------------------------------------

    def _votes(self, q: torch.Tensor, layer: Any, forward_batch: Any, score_mod: Any) -> dict[str, Any]:
        """Arguments for SGLang's forward; resets votes and keeps queries on the way. q [T, Hq * D]."""
        if self.layers.runtime is None:
            return {}
        if score_mod is not None:
            raise ConfigError(f"layer {layer.layer_id} has a score_mod of its own, and SGLang's kernels take one")
        assert layer.tp_q_head_num // layer.tp_k_head_num == self._group
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        self.layers.before(queries, layer, forward_batch.out_cache_loc)
        in_graph = self.layers.graph_rows is not None
        index, table = self.layers.index(layer), self._graph_table if in_graph else self._eager_table
        assert table is not None
        return {"score_mod": vote_score_mod, "aux_tensors": table.aux(index)}

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Any = None,
        score_mod: Any = None,
        aux_tensors: Any = None,
    ) -> torch.Tensor:
        """q [B, Hq * D] -> [B, Hq * D]; one token per request. ConfigError for a layer we do not compute."""
        votes = self._votes(q, layer, forward_batch, score_mod)
        votes = votes or {"score_mod": score_mod, "aux_tensors": aux_tensors}
        return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, sinks, **votes)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Any = None,
        score_mod: Any = None,
        aux_tensors: Any = None,
    ) -> torch.Tensor:
        """q [T, Hq * D] -> [T, Hq * D]; the new tokens of each request, behind its cached ones. Mixed batches too."""
        votes = self._votes(q, layer, forward_batch, score_mod)
        votes = votes or {"score_mod": score_mod, "aux_tensors": aux_tensors}
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, sinks, **votes)
