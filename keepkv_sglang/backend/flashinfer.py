"""SGLang attention backend `keepkv_flashinfer`: FlashInfer's kernels with votes, on NVIDIA GPUs.

Never run on a GPU: what is known comes from compiling (kernels/attention/flashinfer_table.json), from the declarations
as host code, and from these classes with recording wrappers (tests/backend/test_flashinfer.py). So it is chosen by name
only. Importing this file needs neither a GPU nor FlashInfer.

It is SGLang's FlashInferAttnBackend with three differences:

- The wrappers that read the paged pool carry our variant (jit_args), also those made for CUDA graphs.
- forward_* call `run` with the layer's log votes. SGLang calls the deprecated `forward`, which takes no such argument;
  `forward` also sets the causal flag that `run` takes from `plan`, so plan is told here.
- A batch in which some request has cached tokens attends to the pool alone. SGLang would compute its new tokens
  with the ragged kernel and merge the two states. A batch without any has one vote per token, which is plain
  attention, and takes SGLang's ragged path as it is. So no log-sum-exp is merged: FlashInfer's are base 2.

FlashInfer is imported where it is used: it is optional.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from keepkv_sglang.backend.common import VoteLayers
from keepkv_sglang.kernels.attention import flashinfer_variants as variants
from keepkv_sglang.settings.config import ConfigError

FA3_FLAG = "KEEPKV_FLASHINFER_FA3"


class KeepKVFlashInferBackend(FlashInferAttnBackend):
    """SGLang's FlashInfer backend, with votes where KeepKV is on and unchanged where it is off."""

    use_paged: bool

    def __init__(self, runner: Any) -> None:
        super().__init__(runner, init_new_workspace=runner.init_new_workspace)
        # SGLang asks this of its own class only.
        self._check_kv_attention_access("prefill", self.prefill_kv_access)
        self._check_kv_attention_access("decode", self.decode_kv_access)
        self.layers = VoteLayers(runner)
        self.runtime = self.layers.runtime
        if self.runtime is None:
            return
        if self.num_wrappers != 1 or self.enable_mis:
            raise ConfigError(
                "keepkv_flashinfer computes full causal attention only: no sliding window, cross-attention or "
                "multi-item scoring; start the server without --enable-keepkv"
            )
        if runner.dtype != self.flashinfer_kv_cache_dtype:
            raise ConfigError(
                f"keepkv_flashinfer needs the KV cache in the model's dtype {runner.dtype}, not "
                f"{self.flashinfer_kv_cache_dtype}: use --kv-cache-dtype auto"
            )
        shape = runner.dtype, runner.model_config.head_dim
        try:
            self.decode_jit, self.prefill_jit = variants.decode_args(*shape), variants.prefill_args(*shape)
            self.fa3_jit = variants.fa3_args(*shape, experimental=True) if fa3_wanted() else None
        except ValueError as error:
            raise ConfigError(f"{error}; start the server without --enable-keepkv") from error
        self.kv_heads = self.indices_updater_decode.num_kv_heads
        self.paged_always = self.use_paged
        # SGLang's own, just made, have compiled nothing yet: FlashInfer does that at plan.
        self.prefill_wrappers_paged = [self._prefill_wrapper(fa3=self.fa3_jit is not None)]
        self.prefill_wrappers_verify = [self._prefill_wrapper()]
        self.decode_wrappers = [self._decode_wrapper()]

    # -- wrappers ------------------------------------------------------------------------------------------------------

    def _decode_wrapper(self, **buffers: Any) -> Any:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        return BatchDecodeWithPagedKVCacheWrapper(
            self.workspace_buffer,
            "NHD",
            backend=self.decode_backend,
            use_tensor_cores=self.decode_use_tensor_cores,
            # Tensor-core decode is the prefill kernel with one query.
            jit_args=self.prefill_jit if self.decode_use_tensor_cores else self.decode_jit,
            **buffers,
        )

    def _prefill_wrapper(self, fa3: bool = False, **buffers: Any) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            self.workspace_buffer,
            "NHD",
            backend="fa3" if fa3 else self.prefill_backend,
            jit_args=self.fa3_jit if fa3 else self.prefill_jit,
            **buffers,
        )
        # `run` takes causality from `plan`, and SGLang plans without: it tells `forward`. A custom mask wins over it.
        wrapper.begin_forward = functools.partial(wrapper.plan, causal=True)
        return wrapper

    def _create_decode_wrappers(self, bs: int, num_tokens: int) -> list:
        if self.runtime is None:
            return super()._create_decode_wrappers(bs, num_tokens)
        return [
            self._decode_wrapper(
                use_cuda_graph=True,
                paged_kv_indptr_buffer=self.kv_indptr[0][: num_tokens + 1],
                paged_kv_indices_buffer=self.cuda_graph_kv_indices[0],
                paged_kv_last_page_len_buffer=self.kv_last_page_len[:num_tokens],
            )
        ]

    def _create_prefill_wrappers(self, bs: int, use_custom_mask: bool = False) -> list:
        if self.runtime is None:
            return super()._create_prefill_wrappers(bs, use_custom_mask)
        mask = {
            "custom_mask_buf": self.cuda_graph_custom_mask,
            "mask_indptr_buf": self.cuda_graph_qk_indptr[0][: bs + 1],
        }
        return [
            self._prefill_wrapper(
                use_cuda_graph=True,
                qo_indptr_buf=self.cuda_graph_qo_indptr[0][: bs + 1],
                paged_kv_indptr_buf=self.kv_indptr[0][: bs + 1],
                paged_kv_indices_buf=self.cuda_graph_kv_indices[0],
                paged_kv_last_page_len_buf=self.kv_last_page_len[:bs],
                **(mask if use_custom_mask else {}),
            )
        ]

    def _create_full_cg_prefill_wrappers(self, num_slots: int, max_num_tokens: int) -> list:
        if self.runtime is None:
            return super()._create_full_cg_prefill_wrappers(num_slots, max_num_tokens)
        raise ConfigError(
            "--enable-keepkv keeps a prompt's window queries in Python, which a full prefill graph does not run: "
            "use --cuda-graph-backend-prefill breakable or disabled"
        )

    # -- per forward ---------------------------------------------------------------------------------------------------

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, kv_indices_buf: Any = None) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        if self.runtime is not None:
            self.layers.allocate_graph_rows(max_num_tokens)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if self.runtime is not None:
            self.layers.begin()
            if forward_batch.forward_mode.is_extend():
                self.use_paged = self.paged_always or any(forward_batch.extend_prefix_lens_cpu)
        super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if self.runtime is not None:
            self.layers.begin_graph()
        super().init_forward_metadata_out_graph(forward_batch, in_capture)

    # -- per layer -----------------------------------------------------------------------------------------------------

    def forward_decode(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """q [B, Hq * D] -> [B, Hq * D]; one token per request."""
        if self.runtime is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(self.forward_metadata.decode_wrappers[0], q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """q [T, Hq * D] -> [T, Hq * D]; the new tokens of each request, behind its cached ones. Mixed batches too."""
        if self.runtime is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        metadata = self.forward_metadata
        if metadata.use_ragged:
            assert metadata.extend_no_prefix and k is not None, "cached tokens have votes: they are read from the pool"
            self.layers.before(_heads(q, layer), layer, forward_batch.out_cache_loc)
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(metadata.prefill_wrappers[0], q, k, v, layer, forward_batch, save_kv_cache)

    def _attend(
        self, wrapper: Any, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        q3 = _heads(q, layer)
        log_votes = self.layers.before(q3, layer, forward_batch.out_cache_loc)
        if save_kv_cache and k is not None:
            where = KVWriteLoc.for_layer(forward_batch, layer)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, *self._kv_write_scales(layer))
        # The scalars of jit_args, in their order; run() multiplies k_scale only into a scale of its own.
        scalars: tuple[float, ...] = (layer.scaling * (layer.k_scale_float or 1.0),)
        if self.fa3_jit is not None and wrapper is self.prefill_wrappers_paged[0]:
            scalars = (*scalars, self.kv_heads)
        kv_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        out = wrapper.run(q3, kv_cache, log_votes, *scalars, v_scale=layer.v_scale_float)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def _heads(q: torch.Tensor, layer: Any) -> torch.Tensor:
    return q.contiguous().view(-1, layer.tp_q_head_num, layer.qk_head_dim)


def fa3_wanted() -> bool:
    """KEEPKV_FLASHINFER_FA3=1: prefill with the FA3 variant, an experiment on Hopper. ConfigError for other values."""
    value = os.environ.get(FA3_FLAG, "0")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{FA3_FLAG}={value!r} is not known: use 1, or leave it out")
    return value == "1"
