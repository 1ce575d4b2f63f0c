"""The plain-CPU platform itself. SGLang imports this file by name, after `platform.activate` said yes.

transformers is imported where it is used: SGLang loads this file before it patches transformers.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

logger = logging.getLogger("keepkv")

# SGLang fills the KV pool with zeros at start, about 3 s per GB on two cores, and all of it stays resident.
KV_POOL_BYTES = 4 << 30
# Weights and pool together stay under this share of the memory that is free at start: it also holds the
# tokenizer and detokenizer processes, activations, and whatever else the machine does.
MEM_FRACTION_STATIC = 0.8
# A prefill chunk blocks decoding; 2048 tokens already take seconds on a CPU.
CHUNKED_PREFILL_TOKENS = 2048
# SGLang's own rule gives thousands, each with a row of context_length slot numbers.
MAX_RUNNING_REQUESTS = 256
BIND = "SGLANG_CPU_OMP_THREADS_BIND"


class KeepKVCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch on the CPU: no Triton, no graphs, no sgl_kernel.

    `_enum` is OOT, not CPU: SGLang sends its in-tree CPU platform to AMX kernels, an out-of-tree one to the
    `forward_native` methods of its layers.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        """ "cpu", as a string: 0.5.23 splits it at ':' when --device was not given (serving_hook.py:658)."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """Stock torch attention; --enable-keepkv selects the KeepKV backend instead."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open, so that no flag is needed on a CPU.

        `server_args` is SGLang's recorder (arg_groups/overrides.py): reads see what is resolved so far,
        writes become declared defaults.
        """
        for name, value in cpu_defaults(server_args).items():
            setattr(server_args, name, value)
        bind_ranks(server_args.tp_size * server_args.dp_size * server_args.pp_size)


def cpu_defaults(server_args: Any) -> dict[str, Any]:
    """Values for the fields of `server_args` that a CPU needs and the user did not choose."""
    config = _checkpoint_config(server_args.model_path)
    defaults: dict[str, Any] = {}
    dtype = server_args.dtype
    if dtype == "auto" and wants_float32(config):
        dtype = defaults["dtype"] = "float32"
    if server_args.attention_backend in (None, "intel_amx"):
        # SGLang fills in intel_amx for every x86 CPU (platform_hook.handle_cpu_backends); here it cannot run.
        defaults["attention_backend"] = "torch_native"
    if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
        itemsize_bytes = 4 if dtype in ("float32", "float") else 2
        bytes_per_token = kv_elements_per_token(config) * itemsize_bytes // max(1, server_args.tp_size)
        if bytes_per_token:
            defaults["max_total_tokens"] = KV_POOL_BYTES // bytes_per_token
    if server_args.mem_fraction_static is None:
        defaults["mem_fraction_static"] = MEM_FRACTION_STATIC
    if server_args.chunked_prefill_size is None:
        defaults["chunked_prefill_size"] = CHUNKED_PREFILL_TOKENS
    if server_args.max_running_requests is None:
        defaults["max_running_requests"] = MAX_RUNNING_REQUESTS
    # The idle scheduler otherwise spins on a core that the model, or another server, could use.
    defaults["sleep_on_idle"] = True
    return defaults


def bind_ranks(ranks: int) -> None:
    """Shares this process's cores among `ranks` schedulers, where the user did not: SGLang wants a NUMA node for each,
    and ends in an assertion after loading the model where there are fewer. Sets BIND for the child processes."""
    if ranks <= 1 or os.environ.get(BIND):
        return
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    os.environ[BIND] = "|".join(",".join(map(str, share)) for share in shares)
    logger.info("%d ranks share %d cores: %s=%s", ranks, len(cores), BIND, os.environ[BIND])


def kv_elements_per_token(config: dict[str, Any]) -> int:
    """Numbers in the K and V of one token over all layers, from a Hugging Face config; 0 when it cannot say.

    Only sizes the default pool: models with another cache layout (MLA, hybrid) get a smaller pool than
    KV_POOL_BYTES, never a larger one.
    """
    try:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim
    except (KeyError, TypeError):
        return 0


def _checkpoint_config(model_path: str) -> dict[str, Any]:
    """The checkpoint's language-model config as a dict; empty when it cannot be read."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model_path)
    except Exception:  # SGLang reports a missing or broken config itself, and better
        return {}
    return config.get("text_config") or config


def wants_float32(config: dict[str, Any]) -> bool:
    """Whether ``--dtype auto`` should mean float32 for this checkpoint on this CPU.

    SGLang's auto turns a float32 checkpoint into float16, which CPUs emulate slowly; bfloat16 is only fast
    where the CPU multiplies it natively (float32 prefilled 2.5x faster where it does not).
    """
    if not has_native_bfloat16():
        return True
    return (config.get("dtype") or config.get("torch_dtype") or "float32") != "bfloat16"


def has_native_bfloat16() -> bool:
    """AVX-512 BF16 or AMX tiles, as torch sees them."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
