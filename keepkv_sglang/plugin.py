"""Entry point of SGLang's plugin group: registers names and hooks. Importing this file changes nothing.

SGLang calls `register` once in every process of a server. With KeepKV off every hook
returns at once, so SGLang behaves as without the plugin.

SGLang is imported where it is used: importing this file, as any console script of the package may, must be cheap.
"""

from __future__ import annotations

from typing import Any

from keepkv_sglang.hooks import step_times
from keepkv_sglang.hooks.warm_up import warm_up
from keepkv_sglang.start import flags, seams


def register() -> None:
    """Registers flags, hooks, the attention backends and the radix-cache backend with SGLang."""
    from sglang.srt.entrypoints import warmup
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    for seam in (*seams.HOOKS, *(seams.MEASURING if step_times.wanted() else ())):
        HookRegistry.register(seam.target, seams.load_hook(seam), HookType[seam.kind])
    Engine.server_args_class = staticmethod(flags.engine_server_args(Engine.server_args_class))
    for name, create in (
        (flags.CPU_BACKEND, _cpu_backend),
        (flags.TRITON_BACKEND, _triton_backend),
        (flags.FLASHINFER_BACKEND, _flashinfer_backend),
    ):
        if name not in ATTENTION_BACKEND_CHOICES:
            add_attention_backend_choices([name])
            register_attention_backend(name)(create)
    warmup.warmup(flags.WARMUP)(warm_up)
    if flags.RADIX_BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(flags.RADIX_BACKEND, _radix_cache)


def _cpu_backend(runner: Any) -> Any:
    from keepkv_sglang.backend.cpu import KeepKVCpuBackend

    return KeepKVCpuBackend(runner)


def _triton_backend(runner: Any) -> Any:
    from keepkv_sglang.backend.triton import KeepKVTritonBackend

    return KeepKVTritonBackend(runner)


def _flashinfer_backend(runner: Any) -> Any:
    from keepkv_sglang.backend.flashinfer import KeepKVFlashInferBackend

    return KeepKVFlashInferBackend(runner)


def _radix_cache(ctx: Any) -> Any:
    from keepkv_sglang.radix.adapter.cache import create

    return create(ctx)
