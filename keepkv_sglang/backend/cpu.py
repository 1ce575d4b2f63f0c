"""SGLang attention backend for the CPU: our vote-weighted kernels over the paged pool.

Cached queries are never recomputed: a request that extends a cached prefix of 3,000 tokens by one computes one query.
(SGLang's torch_native recomputes all of them.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from keepkv_sglang.backend.common import VoteLayers
from keepkv_sglang.kernels import attention, cpu_build
from keepkv_sglang.kernels.attention.packed import Packed, PackedRows


class KeepKVCpuBackend(AttentionBackend):
    """forward_decode and forward_extend with votes; keeps the window queries that a compression will score with."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.kernel = attention.load()
        for op in ("score", "merge", "codec"):  # compiled now rather than while a request waits
            cpu_build.implementation(op)
        self.pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.layers = VoteLayers(runner, reads_packed=hasattr(self.kernel, "cut"))

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """int64 lengths for the kernels, once per forward instead of once per layer."""
        self.rows = forward_batch.req_pool_indices.to(torch.int64)
        self.seq_lens = forward_batch.seq_lens.to(torch.int64)
        if not forward_batch.forward_mode.is_decode_or_idle():
            self.extend_lens = forward_batch.extend_seq_lens.to(torch.int64)
        self.layers.begin()
        self.packed: PackedRows | None = None
        self.table = self.req_to_token
        runtime = self.layers.runtime
        if runtime is not None and runtime.slot_tokens is not None:
            runtime.slot_tokens.write(forward_batch.out_cache_loc, forward_batch.input_ids)
        if runtime is not None and runtime.cells is not None:
            runtime.cells.reset(forward_batch.out_cache_loc)
            self.packed = runtime.cells.rows(self.req_to_token, self.rows, self.seq_lens)
            if self.packed is not None:
                cut = self.packed.cut
                self.table, self.rows, self.seq_lens = cut.table, cut.rows, cut.lens

    def _before(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool) -> Any:
        """Writes K and V (a rewritten slot stands for one token again) and keeps window queries. Returns log votes."""
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        return self.layers.before(q, layer, forward_batch.out_cache_loc)

    def _cells(self, layer: Any) -> Packed | None:
        """The batch's packed spans, if it has any."""
        return None if self.packed is None else replace(self.packed.packed, layer=self.layers.index(layer))

    def forward_decode(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        """q [B, Hq * D] -> [B, Hq * D]; one token per request."""
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        log_votes = self._before(q3, k, v, layer, forward_batch, save_kv_cache)
        out = torch.empty_like(q3, memory_format=torch.contiguous_format)
        keys, values = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        where = self.table, self.rows, self.seq_lens
        self.kernel.decode(q3, keys, values, log_votes, *where, layer.scaling, out, self._cells(layer))
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        """q [T, Hq * D] -> [T, Hq * D]; the new tokens of each request, behind its cached ones. Mixed batches too."""
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        log_votes = self._before(q3, k, v, layer, forward_batch, save_kv_cache)
        out = torch.empty_like(q3, memory_format=torch.contiguous_format)
        keys, values = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        self.kernel.extend(
            q3,
            keys,
            values,
            log_votes,
            self.table,
            self.rows,
            self.seq_lens,
            self.extend_lens,
            layer.scaling,
            out,
            packed=self._cells(layer),
        )
        for first, count, reading in self.layers.readings:
            self._extend_streamed(q3[first : first + count], layer, reading, out[first : first + count])
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _extend_streamed(self, q: torch.Tensor, layer: Any, reading: Any, out: torch.Tensor) -> None:
        """q [count, Hq, D] -> out: the new tokens of one request, behind the originals of its history."""
        reading.layer(self.layers.index(layer))
        staging = reading.staging
        row, length, new = torch.tensor([0, reading.tokens, len(q)]).split(1)
        table = staging.table
        self.kernel.extend(q, staging.keys, staging.values, None, table, row, length, new, layer.scaling, out)

    def forward_mixed(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward_extend(*args, **kwargs)

    def support_triton(self) -> bool:
        return False
