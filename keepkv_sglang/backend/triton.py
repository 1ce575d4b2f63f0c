"""SGLang attention backend for GPUs: SGLang's own Triton kernels, with votes through their score_mod.

Everything but the votes is SGLang's TritonAttnBackend: metadata, splits, page tables, CUDA graphs. Per forward we point
a table of addresses (kernels/attention/triton_score_mod.py) at the metadata that the kernels will read, and per layer
pass it along. Without --enable-keepkv it is the stock Triton backend.

CUDA graphs record addresses and replay no Python. So there are two tables: one for eager forwards, rewritten by each,
and one for graphs, pointed once at SGLang's static buffers, which every graph reads. What `VoteLayers.before` does in
Python is recorded with the graph: votes of SGLang's static out_cache_loc are reset, and the query of every row is
copied to the arena row that VoteLayers.graph_rows names, the spare one for nobody.

Packed spans (kernels/attention/triton_packed.py): behind SGLang's metadata the rows are cut, in SGLang's own buffers,
and behind SGLang's attention ours joins what the cells give. A graph's launches are recorded where the server packs
spans at all, and end at once for rows without any.

The kernels have run on a GPU, in CUDA graphs too (docs/gpu.md); this class has not: its bookkeeping is tested with
stand-ins (tests/kernels/test_backend_triton.py).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from keepkv_sglang.backend.common import VoteLayers
from keepkv_sglang.kernels.attention import triton_packed
from keepkv_sglang.kernels.attention.triton_packed import CellTable, CutRows
from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, requests_of_tokens, vote_score_mod
from keepkv_sglang.settings.config import ConfigError


class KeepKVTritonBackend(TritonAttnBackend):
    """TritonAttnBackend whose decode and extend weight attention by votes, and which keeps window queries."""

    # Our hooks read the batch's lengths on the host (hooks/extend.py).
    needs_cpu_seq_lens = True

    def __init__(self, model_runner: Any, **kwargs: Any) -> None:
        """ConfigError with decode context parallelism, RuntimeError when KeepKV's hooks did not run."""
        super().__init__(model_runner, **kwargs)
        self._attach(VoteLayers(model_runner, reads_packed=True))

    def _attach(self, layers: VoteLayers) -> None:
        """Makes the tables' static memory, before SGLang captures anything."""
        self.layers = layers
        self._eager_table = self._graph_table = None
        self._cells: CellTable | None = None
        self._found: CutRows | None = None  # of the forward that is about to run
        self._graph_rows: torch.Tensor | None = None
        if layers.runtime is None:
            return
        if self.dcp_size > 1:
            raise ConfigError("SGLang's Triton kernels take no score_mod with decode context parallelism: --dcp-size 1")
        self._group = self.num_head // self.num_kv_head
        self._eager_table = VoteTable(layers.runtime.votes.log_votes, self._group)
        self._graph_table = VoteTable(layers.runtime.votes.log_votes, self._group)
        cells = layers.runtime.cells
        if cells is not None:
            self._cells = CellTable(cells.layers, cells.span_of, cells.start_address)

    # -- metadata -----------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """An eager forward: SGLang's metadata, then the table points at it."""
        super().init_forward_metadata(forward_batch)
        self.layers.begin()
        if self._eager_table is None:
            return
        metadata, requests = self.forward_metadata, None
        self._found = self._cut(forward_batch)
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
        if self._cells is not None:
            self._graph_rows = torch.zeros(max_bs, dtype=torch.int64, device=self.device)
            self._graph_first = torch.zeros(max_bs + 1, dtype=torch.int32, device=self.device)

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
        self._found = self._cut_graph(forward_batch)

    def _cut(self, forward_batch: Any) -> CutRows | None:
        """The rows of an eager forward without their packed spans; None where nothing is packed."""
        cells, batch = self.layers.runtime.cells if self.layers.runtime is not None else None, forward_batch.batch_size
        if self._cells is None or cells is None or not cells.used:
            return None
        metadata, decode = self.forward_metadata, forward_batch.forward_mode.is_decode_or_idle()
        lens = forward_batch.seq_lens if decode else forward_batch.extend_prefix_lens
        if decode:
            metadata.attn_lse.fill_(float("-inf"))  # what SGLang's kernels leave is a part without slots, in all layers
        first = torch.zeros(batch + 1, dtype=torch.int32, device=self.device)
        rows, where = forward_batch.req_pool_indices[:batch], (metadata.kv_indptr, metadata.kv_indices, first)
        return triton_packed.cut(self._cells, self.req_to_token, rows, lens[:batch], *where, keep_last=decode)

    def _cut_graph(self, forward_batch: Any) -> CutRows | None:
        """The same for a graph of a decode, in static buffers."""
        if self._cells is None or self._graph_rows is None or self.layers.runtime is None:
            return None
        batch, cells = forward_batch.batch_size, self.layers.runtime.cells
        rows, first = self._graph_rows[:batch], self._graph_first[: batch + 1]
        indptr, indices = self.kv_indptr[: batch + 1], self.cuda_graph_kv_indices
        rows.copy_(forward_batch.req_pool_indices[:batch])
        if cells is None or not cells.used:
            first.zero_()
            return CutRows(self._cells, self.req_to_token, rows, indptr, indices, first)
        self.cuda_graph_attn_lse[:batch].fill_(float("-inf"))
        lens = forward_batch.seq_lens[:batch]
        return triton_packed.cut(self._cells, self.req_to_token, rows, lens, indptr, indices, first, keep_last=True)

    # -- attention ----------------------------------------------------------------------------------------------------

    def _votes(self, q: torch.Tensor, layer: Any, forward_batch: Any, score_mod: Any) -> dict[str, Any]:
        """Arguments for SGLang's forward, none where no row has votes; resets votes and keeps queries on the way. q
        [T, Hq * D]."""
        if self.layers.runtime is None:
            return {}
        if score_mod is not None:
            raise ConfigError(f"layer {layer.layer_id} has a score_mod of its own, and SGLang's kernels take one")
        assert layer.tp_q_head_num // layer.tp_k_head_num == self._group
        index = self.layers.index(layer)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        self.layers.before(queries, layer, forward_batch.out_cache_loc)
        if index == 0 and self.layers.runtime.cells is not None:
            self.layers.runtime.cells.reset(forward_batch.out_cache_loc)
        in_graph = self.layers.graph_rows is not None
        if not in_graph and not self.layers.voted:
            return {}  # a prefill of uncompressed rows: the score_mod would cost a third of its attention (docs/gpu.md)
        table = self._graph_table if in_graph else self._eager_table
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
        out = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, sinks, **votes)
        if self._found is not None:
            queries, joined = (x.view(-1, layer.tp_q_head_num, layer.v_head_dim) for x in (q, out))
            parts = self.forward_metadata.attn_logits, self.forward_metadata.attn_lse
            triton_packed.decode(queries, self._found, self.layers.index(layer), layer.scaling, *parts, joined)
        return out

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

    def _forward_extend_kernel(self, layer: Any, q: Any, k: Any, v: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
        """SGLang's extend kernel, and packed spans joined into `out` [T, Hq, D]."""
        if self._found is None:
            return super()._forward_extend_kernel(layer, q, k, v, out, *args, **kwargs)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        result = super()._forward_extend_kernel(layer, q, k, v, out, *args, lse_extend=lse, **kwargs)
        queries = self.forward_metadata.qo_indptr
        triton_packed.extend(q, self._found, self.layers.index(layer), layer.scaling, queries, lse, out)
        return result
