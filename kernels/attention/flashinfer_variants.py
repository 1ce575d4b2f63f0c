"""Vote-weighted attention as variants for FlashInfer's JIT: declarations and the jit_args that carry them.

    logit = (q . k) * sm_scale + log_votes[slot(kv_idx), kv_head]      (Eq. 6 of arXiv 2504.09936)

FlashInfer compiles an attention variant, a C++ struct given as text, into its own kernels; the hook that adds
votes is LogitsTransform. Written against FlashInfer 0.7.2 (include/flashinfer/attention/variant_helper.cuh and
hopper/variant_helper.cuh), which must be installed only where the text is compiled: importing this file needs torch.

What the kernels demand of a variant, each learned from their source and held by a test in
tests/kernels/test_flashinfer_variants.py:

- They multiply a *transformed* logit by sm_scale_log2 and take exp2 of it. A bias cannot be scaled twice, so the
  transform applies sm_scale itself and sm_scale_log2 is log2(e) (as FlashInfer's own ALiBi does).
- Decode transforms padding rows before it masks them: loads are guarded by kv_idx < kv_len.
- has_maybe_mask_indptr exists in FlashInfer already; declaring it again is ambiguous.
- The FA3 mainloop passes batch_idx 0 whatever the request: its variant captures the request in the constructor.
- A log-sum-exp that comes back is base 2; SGLang's Triton backend and merge_state_triton count in base e.

A log vote of -inf or <= MASKED (contract.py; -1e30 is the finite form that is stored) becomes FlashInfer's own
masked logit, -math::inf: its weight is exactly 0 and a query that sees only such entries gets zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from .contract import MASKED

DTYPES = (torch.bfloat16, torch.float16)
# FlashInfer's FA2 and decode kernels are tiled for these; others compile to a static_assert or not at all.
HEAD_DIMS = (64, 128, 256)

# What run() takes, in this order: the tensors it does not fill itself, then the scalars.
TENSORS = {"decode": ("log_votes",), "prefill": ("log_votes", "maybe_custom_mask", "maybe_mask_indptr")}
TENSOR_TYPES = {"log_votes": "float", "maybe_custom_mask": "uint8_t", "maybe_mask_indptr": "int32_t"}
SCALARS = ("sm_scale",)
FA3_SCALARS = ("sm_scale", "log_votes_heads")
SCALAR_TYPES = {"sm_scale": "double", "log_votes_heads": "int64_t"}

# pos_encoding_mode, use_sliding_window, use_logits_soft_cap, use_fp16_qk_reduction, fp8_enabled, paged_kv_stride_mode.
# In jit_args, not in jit_kwargs: the decode wrapper has no jit_kwargs, and both must name one and the same module.
EQUAL_STRIDES = (0, False, False, False, False, "equal")

_MASKED = f"{MASKED:.1e}f"

# One text for decode (decode.cuh) and prefill (prefill.cuh). Ragged prefill compiles it too, without paged_kv: there
# it is plain attention, which is what tokens that were never merged need.
FA2 = (
    r"""
DEFINE_HAS_MEMBER(paged_kv)

template <bool USE_CUSTOM_MASK>
struct KeepKVAttention : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  float sm_scale, sm_scale_log2;
  const uint8_t* mask_bits;

  template <typename Params>
  __device__ __host__ KeepKVAttention(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = (params.window_left >= 0) ? params.window_left : kv_len;
    sm_scale = float(params.sm_scale);
    sm_scale_log2 = math::log2e;
    mask_bits = nullptr;
    if constexpr (USE_CUSTOM_MASK) {
      mask_bits = params.maybe_custom_mask + params.maybe_mask_indptr[batch_idx];
    }
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    float x = logits * sm_scale;
    if constexpr (has_paged_kv_v<Params>) {
      if (kv_idx < kv_len) {
        uint32_t page, entry;
        params.paged_kv.page_size.divmod(kv_idx, page, entry);
        const uint32_t slot =
            uint32_t(__ldg(params.paged_kv.indices + params.paged_kv.indptr[batch_idx] + page)) *
                uint32_t(params.paged_kv.page_size) + entry;
        const float vote = __ldg(params.log_votes + size_t(slot) * params.paged_kv.num_heads + kv_head_idx);
        x = vote > MASKED ? x + vote : -math::inf;
      }
    }
    return x;
  })

  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    bool mask = true;
    if constexpr (USE_CUSTOM_MASK) {
      if (qo_idx >= qo_len || kv_idx >= kv_len) {
        mask = false;
      } else {
        const uint64_t offset = uint64_t(qo_idx) * kv_len + kv_idx;
        mask = (mask_bits[offset >> 3] >> (offset & 7)) & 1;
      }
    }
    return mask;
  })
};
"""
).replace("MASKED ?", f"{_MASKED} ?")

FA3 = (
    r"""
DEFINE_HAS_MEMBER(kv_indices)

struct KeepKVAttentionSM90 : AttentionVariantBase {
  float sm_scale, sm_scale_log2, scale_pv;
  int kv_len, heads;
  const int32_t* pages;
  const float* votes;

  template <typename MainloopParams, typename BlockCoord>
  __device__ KeepKVAttentionSM90(const MainloopParams& params, const BlockCoord& block_coord) {
    auto [q_tile_idx, qo_head_idx, kv_head_idx, qo_indptr, kv_indptr, qo_len, kv_len_, batch_idx] =
        block_coord;
    sm_scale = float(params.additional_params.sm_scale);
    sm_scale_log2 = math::log2e;
    scale_pv = 1.f;
    kv_len = kv_len_;
    heads = int(params.additional_params.log_votes_heads);
    votes = params.additional_params.log_votes + kv_head_idx;
    pages = nullptr;
    if constexpr (has_kv_indices_v<MainloopParams>) {
      pages = params.kv_indices + kv_indptr;
    }
  }

  template <int NUM_ROWS_PER_THREAD>
  __device__ auto GetAttentionUpdater() {
    return OnlineSoftmax<NUM_ROWS_PER_THREAD, /*WITH_SCALE=*/true>(sm_scale_log2);
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    float x = logits * sm_scale;
    if constexpr (has_kv_indices_v<MainloopParams>) {
      if (int(kv_idx) < kv_len) {
        const float vote = __ldg(votes + size_t(__ldg(pages + kv_idx)) * heads);
        x = vote > MASKED ? x + vote : -math::inf;
      }
    }
    return x;
  })
};
"""
).replace("MASKED ?", f"{_MASKED} ?")


def decode_args(dtype: torch.dtype, head_dim: int) -> list[Any]:
    """jit_args of BatchDecodeWithPagedKVCacheWrapper(use_tensor_cores=False).

    dtype: of q, K, V and the output, bfloat16 or float16; indices are int32. head_dim: one of HEAD_DIMS. run() then
    takes, behind q and the KV cache, log_votes float32 [slots, kv_heads] (contiguous) and sm_scale float.
    ValueError for another dtype or head_dim.
    """
    return _args("decode", dtype, head_dim, TENSORS["decode"], SCALARS, "KeepKVAttention<false>", FA2)


def prefill_args(dtype: torch.dtype, head_dim: int) -> list[Any]:
    """jit_args of BatchPrefillWithPagedKVCacheWrapper(backend="fa2") and of tensor-core decode.

    As decode_args, and six further elements, arguments of FlashInfer's gen_customize_batch_prefill_module: they say
    that K and V have the same strides, which halves what is compiled (unequal ones raise at run time). The wrapper
    fills the packed custom mask and its indptr itself from plan(custom_mask=...); use_custom_mask is a constant that
    FlashInfer's dispatch defines per mask mode, so one module serves all of them.
    """
    args = _args("prefill", dtype, head_dim, TENSORS["prefill"], SCALARS, "KeepKVAttention<use_custom_mask>", FA2)
    return args + list(EQUAL_STRIDES)


def fa3_args(dtype: torch.dtype, head_dim: int, *, experimental: bool = False) -> list[Any]:
    """jit_args of BatchPrefillWithPagedKVCacheWrapper(backend="fa3"), on Hopper: page_size 1, no custom mask, K and
    V of equal strides. run() takes log_votes, sm_scale and kv_heads.

    ValueError unless experimental=True: no test reaches its tiles without a GPU, and it has never run on one.
    """
    if not experimental:
        raise ValueError("the FA3 variant has never run on a GPU: pass experimental=True to try it")
    return _args("fa3", dtype, head_dim, TENSORS["decode"], FA3_SCALARS, "KeepKVAttentionSM90", FA3)


def _args(
    kind: str,
    dtype: torch.dtype,
    head_dim: int,
    tensors: Sequence[str],
    scalars: Sequence[str],
    variant: str,
    declaration: str,
) -> list[Any]:
    if dtype not in DTYPES:
        raise ValueError(f"FlashInfer's vote kernels compute {', '.join(map(str, DTYPES))}, not {dtype}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"FlashInfer's vote kernels are tiled for head_dim {HEAD_DIMS}, not {head_dim}")
    return [
        uri(kind, dtype, head_dim, declaration),
        dtype,
        dtype,
        dtype,
        torch.int32,
        head_dim,
        head_dim,
        list(tensors),
        [TENSOR_TYPES[name] for name in tensors],
        list(scalars),
        [SCALAR_TYPES[name] for name in scalars],
        variant,
        declaration,
    ]


def uri(kind: str, dtype: torch.dtype, head_dim: int, declaration: str) -> str:
    """Name of the compiled module. It holds a hash of the text: FlashInfer caches modules by name, in a folder that
    outlives an upgrade of this package."""
    digest = hashlib.sha256(declaration.encode()).hexdigest()[:10]
    return f"keepkv_{kind}_{str(dtype).removeprefix('torch.')}_d{head_dim}_{digest}"
