"""What KeepKV cannot work with, in one table each for flags, SGLang's environment and models.

A combination listed here stops the server at start with one line that says what to change. The reason is
the attachment point that would break, not a matter of taste.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from keepkv_sglang.settings.config import ConfigError
from keepkv_sglang.settings.values import shown

# (ServerArgs field, is it a problem?, what to do)
FLAG_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("page_size", lambda v: v not in (None, 1), "merged tokens need single slots: use --page-size 1"),
    (
        "speculative_algorithm",
        lambda v: v not in (None, "NONE"),
        "speculative decoding keeps its own lengths and positions: leave out --speculative-algorithm",
    ),
    (
        "disaggregation_mode",
        lambda v: v not in (None, "null"),
        "prefill/decode disaggregation transfers rows by logical length: leave out --disaggregation-mode",
    ),
    ("enable_hierarchical_cache", bool, "HiCache copies rows by logical length: leave out --enable-hierarchical-cache"),
    ("enable_lmcache", bool, "LMCache stores one slot per token: leave out --enable-lmcache"),
    ("enable_flexkv", bool, "FlexKV stores one slot per token: leave out --enable-flexkv"),
    (
        "enable_unified_cache_external_linker",
        bool,
        "the external cache linker stores one slot per token: leave out --enable-unified-cache-external-linker",
    ),
    ("enable_streaming_session", bool, "streaming sessions keep rows across requests: leave out --enable-streaming-session"),
    ("enable_session_radix_cache", bool, "session references know only SGLang's own nodes: leave out --enable-session-radix-cache"),
    ("strip_thinking_cache", bool, "it publishes rows by logical length: leave out --strip-thinking-cache"),
    ("enable_hisparse", bool, "HiSparse moves KV by logical length: leave out --enable-hisparse"),
    ("dllm_algorithm", lambda v: v is not None, "diffusion models rewrite blocks in place: leave out --dllm-algorithm"),
    ("enable_unified_memory", bool, "the unified memory pool relocates slots: leave out --enable-unified-memory"),
    ("enable_page_major_kv_layout", bool, "merging reads the token-major KV layout: leave out --enable-page-major-kv-layout"),
    ("is_embedding", bool, "an embedding server has no decode phase: leave out --enable-keepkv"),
    ("pp_size", lambda v: (v or 1) > 1, "pipeline parallelism is not tested with merging: use --pp-size 1"),
    ("dcp_size", lambda v: (v or 1) > 1, "decode context parallelism shards rows by position: use --dcp-size 1"),
    ("attn_cp_size", lambda v: (v or 1) > 1, "context parallelism shards rows by position: use --attn-cp-size 1"),
    ("enable_return_routed_experts", bool, "routed experts are read by logical position: leave out --enable-return-routed-experts"),
    ("enable_return_indexer_topk", bool, "indexer results are read by logical position: leave out --enable-return-indexer-topk"),
    ("enable_two_batch_overlap", bool, "two-batch overlap splits a batch behind our metadata: leave out --enable-two-batch-overlap"),
    (
        "kv_canary",
        lambda v: v not in (None, "none"),
        "the canary takes logical positions for lengths and would end the server at the first compressed row: leave out --kv-canary",
    ),
    (
        "tokenizer_worker_num",
        lambda v: (v or 1) > 1,
        "SGLang loads no plugins in several tokenizer workers, so nothing would check requests: use --tokenizer-worker-num 1",
    ),
    (
        "enable_deterministic_inference",
        bool,
        "SGLang knows our attention backends as no deterministic ones: leave out --enable-deterministic-inference",
    ),
    ("enable_torch_compile", bool, "a compiled model would not ask for votes: leave out --enable-torch-compile"),
    (
        "cuda_graph_backend_prefill",
        lambda v: v == "full",
        "a full graph of a prefill knows one batch's rows: use --cuda-graph-backend-prefill breakable",
    ),
    ("enable_pdmux", bool, "PD multiplexing runs prefill beside decode: leave out --enable-pdmux"),
    (
        "kv_cache_dtype",
        lambda v: v is not None and not str(v).replace("_", "").startswith(("auto", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32")),
        "merging quantised KV is not supported: use --kv-cache-dtype auto",
    ),
)

# What our CPU platform cannot run, with KeepKV or without it: (ServerArgs field, is it a problem?, what to do)
CPU_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("enable_lora", bool, "SGLang's LoRA layers need a GPU driver: leave out --enable-lora and --lora-paths"),
    ("lora_paths", bool, "SGLang's LoRA layers need a GPU driver: leave out --lora-paths"),
)

# (variable that switches something on in SGLang, why not)
ENVIRONMENT_RULES: tuple[tuple[str, str], ...] = (
    ("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "it would replay one step's choice of window queries for ever"),
    ("SGLANG_RUST_SERVER", "the Rust front end loads no plugins, so nothing would check requests"),
    ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "votes are allocated with the pool, before its size would be known"),
)

# (attribute of SGLang's ModelConfig, is it a problem?, what to say)
MODEL_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("attention_arch", lambda v: v is not None and getattr(v, "name", "MHA") != "MHA", "MLA models keep no per-head keys"),
    ("is_hybrid_swa", bool, "sliding-window layers drop slots by position"),
    ("sliding_window_size", lambda v: v is not None and v > 0, "sliding-window layers drop slots by position"),
    ("attention_chunk_size", lambda v: v is not None, "chunked local attention drops slots by position"),
    ("is_encoder_decoder", bool, "cross-attention KV has no positions to merge"),
    ("model_is_mrope", bool, "multimodal rotary positions are not tracked for merged tokens"),
    ("is_generation", lambda v: v is False, "the model generates no text"),
)


def check_server_args(server_args: Any) -> None:
    """Raises ConfigError for the first flag that KeepKV cannot be combined with."""
    for field, is_problem, advice in FLAG_RULES:
        if is_problem(getattr(server_args, field, None)):
            raise ConfigError(f"--enable-keepkv cannot be combined with {field}: {advice}")


def check_cpu(server_args: Any) -> None:
    """Raises ConfigError for the first flag that cannot work on a CPU without AMX."""
    for field, is_problem, advice in CPU_RULES:
        if is_problem(getattr(server_args, field, None)):
            raise ConfigError(f"this machine has no accelerator, and {field} does not work on its CPU: {advice}")


def check_preferred(server_args: Any, config: Any) -> None:
    """Raises ConfigError where --preferred-sampling-params asks for something that no request may ask for."""
    preferred = getattr(server_args, "preferred_sampling_params", None)
    if isinstance(preferred, str):
        try:
            preferred = json.loads(preferred)
        except ValueError:
            return  # SGLang says what is wrong with it
    custom = preferred.get("custom_params") if isinstance(preferred, dict) else None
    if custom is None:
        return
    if not isinstance(custom, dict):
        raise ConfigError(f"--preferred-sampling-params: custom_params must be an object, not {shown(custom)}")
    try:
        config.with_request(custom.get("keepkv"))
    except ConfigError as error:
        raise ConfigError(f"--preferred-sampling-params: {error}") from None


def check_record(folder: str) -> None:
    """Makes the folder of --keepkv-record, for its owner only. Raises ConfigError where nothing can be written."""
    if not folder:
        return
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--keepkv-record {shown(folder)}: {error.strerror}; name a folder that can be made") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--keepkv-record {shown(folder)}: nothing can be written there; name another folder")


def check_environment(envs: Any) -> None:
    """Raises ConfigError for the first variable of SGLang's `envs` that is set and does not go with KeepKV."""
    for name, reason in ENVIRONMENT_RULES:
        if getattr(envs, name).get():
            raise ConfigError(f"--enable-keepkv cannot be combined with {name}: {reason}; set it to 0")


def check_model(model_config: Any) -> None:
    """Raises ConfigError when the model's attention is not plain multi-head or grouped-query attention."""
    advice = "start the server without --enable-keepkv"
    for field, is_problem, reason in MODEL_RULES:
        if is_problem(getattr(model_config, field, None)):
            raise ConfigError(f"this model does not work with --enable-keepkv ({field}): {reason}; {advice}")
    text_config = getattr(model_config, "hf_text_config", None)
    for key in ("layer_types", "layers_block_type"):
        kinds = set(getattr(text_config, key, None) or ())
        odd = sorted(kind for kind in kinds if kind not in ("full_attention", "attention"))
        if odd:
            raise ConfigError(
                f"this model does not work with --enable-keepkv: it has {', '.join(odd)} layers; {advice}"
            )


def check_layer(layer: Any) -> None:
    """Raises ConfigError for a RadixAttention layer our kernels do not compute. Called once per layer."""
    problem = None
    if layer.logit_cap:
        problem = f"logit soft-capping ({layer.logit_cap})"
    elif layer.sliding_window_size is not None and layer.sliding_window_size > 0:
        problem = f"a sliding window of {layer.sliding_window_size}"
    elif layer.is_cross_attention:
        problem = "cross-attention"
    elif layer.qk_head_dim != layer.v_head_dim:
        problem = f"key and value head sizes that differ ({layer.qk_head_dim}, {layer.v_head_dim})"
    elif getattr(layer, "xai_temperature_len", -1) > 0:
        problem = "attention temperature by position"
    elif getattr(layer.attn_type, "name", "DECODER") not in ("DECODER",):
        problem = f"{layer.attn_type} attention"
    if problem:
        raise ConfigError(
            f"attention layer {layer.layer_id} uses {problem}, which KeepKV's kernels do not compute; "
            "start the server without --enable-keepkv"
        )
