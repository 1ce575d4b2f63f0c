"""Every name of SGLang that KeepKV hooks, overrides or registers with, in one table that is checked at load.

SGLang logs and swallows a plugin's failures, and a renamed target would silently disable a hook. So the server
refuses to start with --enable-keepkv when one row does not match, and `keepkv check` prints them all.

SGLang is imported where it is used: `keepkv check` reads this table where SGLang may be missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keepkv_sglang.settings.config import ConfigError

TESTED_SGLANG = "0.5.23"


@dataclass(frozen=True)
class Seam:
    """One attachment point. params: names that must lead the signature, in order; hook: "module:function" of ours."""

    target: str
    params: tuple[str, ...] = ()
    kind: str = ""  # BEFORE, AFTER, AROUND for hooks; "" for names that are used or overridden
    hook: str = ""


@dataclass(frozen=True)
class SeamResult:
    """What `keepkv check` prints for one row."""

    name: str
    ok: bool
    reason: str


_H = "keepkv_sglang.hooks"
HOOKS: tuple[Seam, ...] = (
    Seam("sglang.srt.server_args.ServerArgs.add_cli_args", ("parser",), "AFTER", "keepkv_sglang.start.flags:add_cli_args"),
    Seam("sglang.srt.server_args.ServerArgs.from_cli_args", ("cls", "args"), "BEFORE", "keepkv_sglang.start.flags:before_from_cli_args"),
    Seam("sglang.srt.server_args.ServerArgs.from_cli_args", ("cls", "args"), "AFTER", "keepkv_sglang.start.flags:after_from_cli_args"),
    Seam("sglang.srt.managers.scheduler.Scheduler.__init__", ("self", "server_args"), "AROUND", f"{_H}.scheduler:around_init"),
    Seam("sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size", ("self", "kvc", "num_layers"), "AFTER", f"{_H}.pool_size:after_compute_cell_size"),
    Seam("sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes", ("self", "pre_model_load_memory"), "AFTER", f"{_H}.pool_size:after_profile_available_bytes"),
    Seam("sglang.srt.managers.scheduler.Scheduler.update_running_batch", ("self", "batch"), "BEFORE", f"{_H}.scheduler:before_update_running_batch"),
    Seam("sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode", ("self",), "BEFORE", f"{_H}.scheduler:before_prepare_for_decode"),
    Seam("sglang.srt.managers.scheduler.Scheduler.stash_chunked_request", ("self", "req"), "AFTER", f"{_H}.scheduler:after_stash_chunked_request"),
    Seam("sglang.srt.mem_cache.common.release_kv_cache", ("req", "tree_cache", "checkpoint"), "AROUND", f"{_H}.scheduler:around_release"),
    Seam("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req"), "AFTER", f"{_H}.answers:after_get_internal_state"),
    Seam("sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class", ("self",), "AFTER", f"{_H}.answers:after_get_output_streamer_class"),
    Seam("sglang.srt.managers.scheduler.Scheduler.on_idle", ("self",), "AFTER", f"{_H}.scheduler:after_on_idle"),
    Seam("sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens", ("self", "req"), "AROUND", f"{_H}.admission:around_init_req_max_new_tokens"),
    Seam("sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class", ("self",), "AFTER", f"{_H}.adder:after_get_prefill_adder_class"),
    Seam("sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill", ("self", "running_batch"), "AROUND", f"{_H}.admission:around_get_new_batch_prefill"),
    Seam("sglang.srt.mem_cache.allocation._prefix_kv_indices", ("batch", "req"), "AROUND", f"{_H}.extend:around_prefix_kv_indices"),
    Seam("sglang.srt.mem_cache.allocation.alloc_for_extend", ("batch",), "AROUND", f"{_H}.extend:around_alloc_for_extend"),
    Seam("sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend", ("self",), "AFTER", f"{_H}.extend:after_prepare_for_extend"),
    Seam("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", ("cls", "batch"), "AFTER", f"{_H}.extend:after_init_new"),
    Seam("sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object", ("self", "obj", "input_text", "input_ids"), "BEFORE", f"{_H}.frontend:before_create_tokenized_object"),
    Seam("sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info", ("self", "meta_info", "state", "customized_info", "index"), "AROUND", f"{_H}.frontend:around_update_request_meta_info"),
    Seam("sglang.srt.entrypoints.http_server.serve_generate_request", ("obj", "request"), "AROUND", f"{_H}.frontend:around_serve_generate_request"),
    Seam("sglang.srt.entrypoints.http_server._setup_and_run_http_server", ("server_args",), "BEFORE", f"{_H}.endpoints:before_run_http_server"),
)
# Registered only where KEEPKV_STEP_TIMES=1 asks for it (step_times.py).
MEASURING: tuple[Seam, ...] = (
    Seam("sglang.srt.managers.scheduler.Scheduler.run_batch", ("self", "batch"), "AROUND", "keepkv_sglang.hooks.step_times:around_run_batch"),
    Seam("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req"), "AFTER", "keepkv_sglang.hooks.step_times:after_get_internal_state"),
)

_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_TRITON = "sglang.srt.layers.attention.triton_backend.TritonAttnBackend"
_ATTENTION_PARAMS = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "sinks", "score_mod", "aux_tensors")
_FLASHINFER = "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend"
USES: tuple[Seam, ...] = (
    Seam("sglang.srt.plugins.hook_registry.HookRegistry.register", ("cls", "target", "hook", "hook_type")),
    Seam("sglang.srt.entrypoints.engine.Engine.server_args_class"),
    Seam("sglang.srt.entrypoints.warmup.warmup", ("name",)),
    Seam("sglang.srt.managers.tokenizer_manager.TokenizerManager.flush_cache", ("self", "timeout_s")),
    Seam("sglang.srt.layers.rotary_embedding.base.RotaryEmbedding._compute_cos_sin_cache", ("self",)),
    Seam("sglang.srt.layers.attention.attention_registry.register_attention_backend", ("name",)),
    Seam("sglang.srt.server_args.add_attention_backend_choices"),
    Seam(f"{_TRITON}.__init__", ("self", "model_runner")),
    Seam(f"{_TRITON}.init_forward_metadata", ("self", "forward_batch")),
    Seam(f"{_TRITON}.init_forward_metadata_out_graph", ("self", "forward_batch", "in_capture")),
    Seam(f"{_TRITON}.init_cuda_graph_state", ("self", "max_bs", "max_num_tokens", "kv_indices_buf")),
    Seam(f"{_TRITON}.forward_decode", _ATTENTION_PARAMS),
    Seam(f"{_TRITON}.forward_extend", _ATTENTION_PARAMS),
    Seam(f"{_TRITON}._forward_extend_kernel", ("self", "layer")),
    Seam("sglang.kernels.ops.attention.score_mod.unpack_aux_tensors", ("score_mod", "aux_tensors")),
    Seam(f"{_FLASHINFER}.__init__", ("self", "model_runner", "skip_prefill", "kv_indptr_buf", "kv_last_page_len_buf", "init_new_workspace")),
    Seam(f"{_FLASHINFER}._check_kv_attention_access", ("self", "phase", "access")),
    Seam(f"{_FLASHINFER}._create_decode_wrappers", ("self", "bs", "num_tokens")),
    Seam(f"{_FLASHINFER}._create_prefill_wrappers", ("self", "bs", "use_custom_mask")),
    Seam(f"{_FLASHINFER}._create_full_cg_prefill_wrappers", ("self", "num_slots", "max_num_tokens")),
    Seam(f"{_FLASHINFER}.init_cuda_graph_state", ("self", "max_bs", "max_num_tokens", "kv_indices_buf")),
    Seam(f"{_FLASHINFER}.init_forward_metadata", ("self", "forward_batch")),
    Seam(f"{_FLASHINFER}.init_forward_metadata_out_graph", ("self", "forward_batch", "in_capture")),
    Seam(f"{_FLASHINFER}.forward_decode", ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")),
    Seam(f"{_FLASHINFER}.forward_extend", ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")),
    Seam(f"{_FLASHINFER}._kv_write_scales", ("self", "layer")),
    Seam("sglang.srt.layers.attention.flashinfer_backend.PrefillMetadata", ("prefill_wrappers", "use_ragged", "extend_no_prefix")),
    Seam("sglang.srt.environ.envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH"),
    Seam("sglang.srt.environ.envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
    Seam("sglang.srt.mem_cache.memory_pool.KVWriteLoc.for_layer", ("cls", "forward_batch", "layer")),
    Seam("sglang.srt.mem_cache.host_memory.available_host_memory_bytes", ("allow_cgroup_fallback",)),
    Seam("sglang.srt.mem_cache.pool_host.common.HostTensorAllocator"),
    Seam(
        "sglang.srt.mem_cache.pool_host.common.alloc_with_host_register",
        ("dims", "dtype", "device", "pin_memory", "allocator"),
    ),
    Seam("sglang.srt.mem_cache.registry.register_radix_cache_backend", ("name", "factory")),
    Seam("sglang.srt.mem_cache.registry.create_unified_radix_cache", ("ctx", "cache_class")),
    Seam(f"{_CACHE}.reset", ("self",)),
    Seam(f"{_CACHE}.match_prefix", ("self", "params")),
    Seam(f"{_CACHE}.lock", ("self", "node_id")),
    Seam(f"{_CACHE}.unlock", ("self", "lock")),
    Seam(f"{_CACHE}.inc_lock_ref", ("self", "node_id")),
    Seam(f"{_CACHE}.dec_lock_ref", ("self", "node_id", "params")),
    Seam(f"{_CACHE}.take_events", ("self",)),
    Seam("sglang.srt.mem_cache.events.KVCacheEventRecorder.record_store", ("self", "node")),
    Seam("sglang.srt.mem_cache.events.KVCacheEventRecorder.record_remove", ("self", "node")),
    Seam("sglang.srt.mem_cache.events.KVCacheEventRecorder._node_event_hash_values", ("self", "node")),
    Seam("sglang.srt.managers.scheduler.Scheduler.is_fully_idle", ("self",)),
    Seam(f"{_CACHE}.checkpoint", ("self", "req", "up_to")),
    Seam(f"{_CACHE}.checkpoint_into_tree", ("self", "req", "up_to")),
    Seam(f"{_CACHE}.prefix_device_indices", ("self", "req")),
    Seam(f"{_CACHE}.init_load_back", ("self", "params")),
    Seam(f"{_CACHE}.load_back_is_cache_owned", ("self",)),
    Seam(f"{_CACHE}.path_device_indices", ("self", "node")),
    Seam(f"{_CACHE}.rotation_base_of", ("self", "node_id")),
    Seam(f"{_CACHE}.dfs_weight_order", ("self", "node_handles")),
    Seam(f"{_CACHE}.is_root", ("self", "node_id")),
    Seam(f"{_CACHE}._evict_components", ("self", "request_by_type", "tracker", "available_size_targets")),
    Seam(f"{_CACHE}._evict_device_leaf", ("self", "node_id", "tracker")),
    Seam(f"{_CACHE}.evictable_size", ("self",)),
    Seam(f"{_CACHE}.full_evictable_size", ("self",)),
    Seam(f"{_CACHE}.protected_size", ("self",)),
    Seam(f"{_CACHE}.full_protected_size", ("self",)),
    Seam("sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface.collect_path_info", ("self", "end_node_ids")),
    Seam("sglang.srt.mem_cache.base_prefix_cache.TreeLock", ("node", "receipt")),
    Seam("sglang.srt.managers.schedule_batch.ReqKvInfo.cache_protected_len"),
    Seam("sglang.srt.managers.schedule_batch.ReqKvInfo.kv_committed_len"),
    Seam("sglang.srt.managers.schedule_batch.ReqKvInfo.kv_allocated_len"),
    Seam("sglang.srt.managers.schedule_batch.Req.output_ids_through_stop"),
    Seam("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_key_buffer", ("self", "layer_id")),
    Seam("sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.build_additional_customized_info", ("self", "reqs")),
    Seam("sglang.srt.constants.HEALTH_CHECK_RID_PREFIX"),
    Seam("sglang.srt.observability.metrics_collector.SchedulerMetricsCollectorContext.current_scheduler_metrics_enabled"),
    Seam("sglang.srt.observability.metrics_collector.SchedulerMetricsCollectorContext.collector"),
    Seam("sglang.srt.observability.metrics_collector.SchedulerMetricsCollector._counter_cls"),
    Seam("sglang.srt.observability.metrics_collector.SchedulerMetricsCollector._gauge_cls"),
    Seam("sglang.srt.observability.metrics_collector.SchedulerMetricsCollector._histogram_cls"),
    Seam("sglang.srt.entrypoints.http_server._create_error_response", ("e",)),
    Seam("sglang.srt.entrypoints.http_server.server_info"),
    Seam("sglang.srt.entrypoints.http_server.get_server_info"),
    Seam("sglang.srt.utils.auth.auth_level", ("level",)),
    Seam("sglang.srt.utils.auth.AuthLevel.ADMIN_OPTIONAL"),
    Seam("sglang.srt.configs.model_config.ModelConfig.from_server_args", ("server_args",)),
    Seam("sglang.srt.managers.schedule_policy.PrefillAdder._check_prefill_budget", ("self", "req", "extend_input_len", "total_tokens")),
    Seam("sglang.srt.managers.schedule_policy.PrefillAdder._update_prefill_budget", ("self", "prefix_len", "extend_input_len", "max_new_tokens")),
    Seam("sglang.srt.managers.schedule_policy.PrefillAdder._get_running_request_total_token_offset", ("self", "req")),
    Seam("sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req", ("self", "req", "has_chunked_req")),
    Seam("sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req", ("self", "req")),
    Seam("sglang.srt.mem_cache.base_prefix_cache.InitLoadBackParams.req"),
    Seam("sglang.srt.managers.schedule_policy.PrefillAdder.budget_state", ("self",)),
    Seam("sglang.srt.mem_cache.prefill_budget.PrefillBudget.available_chunk_tokens", ("self", "chunk_limit")),
    Seam("sglang.srt.managers.schedule_batch.FINISH_ABORT"),
    Seam("sglang.srt.managers.schedule_batch.NextBatchPlan"),
    Seam("sglang.srt.managers.schedule_batch.Req.set_finish_with_abort", ("self", "error_msg", "status_code", "err_type")),
    Seam("sglang.srt.managers.scheduler._make_abort_req", ("req", "finished_reason")),
    Seam("sglang.srt.managers.scheduler.Scheduler._release_aborted_request", ("self", "req")),
    Seam("sglang.srt.managers.scheduler.Scheduler.send_abort_output", ("self", "abort_req", "req")),
    Seam("sglang.srt.disaggregation.utils.prepare_abort", ("req", "error_message", "status_code")),
)


def load_hook(seam: Seam) -> Callable[..., Any]:
    """Our function for a hook row."""
    module, name = seam.hook.split(":")
    return getattr(importlib.import_module(module), name)


def check(seam: Seam) -> SeamResult:
    """Whether the target exists and its signature begins as expected. Imports the target's module."""
    name = f"{seam.kind.lower() + ' ' if seam.kind else ''}{seam.target.removeprefix('sglang.srt.')}"
    try:
        owner_path, attribute = seam.target.rsplit(".", 1)
        owner = pkgutil.resolve_name(owner_path)
        target = getattr(owner, attribute)
    except Exception as error:  # an import of SGLang can fail in many ways; each is a reason to refuse
        return SeamResult(name, False, f"not found: {error!r}")
    if isinstance(owner, type):
        target = owner.__dict__.get(attribute, target)
    if isinstance(target, classmethod | staticmethod):
        target = target.__func__
    if not seam.params:
        return SeamResult(name, True, "found")
    try:
        # A function that is hooked already leads to the original through __wrapped__.
        have = tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError) as error:
        return SeamResult(name, False, f"its signature cannot be read: {error}")
    missing = [p for p in seam.params if p not in have]
    if missing or have[: len(seam.params) - 1] != seam.params[:-1]:
        return SeamResult(name, False, f"signature changed: expected {seam.params}, found {have}")
    return SeamResult(name, True, "matches")


def check_hooks_applied() -> list[SeamResult]:
    """After loading: SGLang really wrapped every target. Rows only where load_plugins() has run."""
    from sglang.srt import plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    if not getattr(plugins, "_plugins_loaded", False):
        return []
    targets = dict.fromkeys(seam.target for seam in HOOKS)
    return [
        SeamResult(f"hook on {t.removeprefix('sglang.srt.')}", ok := t in HookRegistry._patched, "applied" if ok else "not applied")
        for t in targets
    ]


def check_all() -> list[SeamResult]:
    """Every row, the SGLang version first."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return [SeamResult("sglang version", False, f"SGLang is not installed; pip install sglang=={TESTED_SGLANG}")]
    same = version == TESTED_SGLANG
    reason = version if same else f"{version} is installed, {TESTED_SGLANG} was tested; pip install sglang=={TESTED_SGLANG}"
    rows = [SeamResult("sglang version", same, reason)]
    return rows + [check(seam) for seam in (*HOOKS, *MEASURING, *USES)] + check_hooks_applied()


def require() -> None:
    """Raises ConfigError naming the first seam that does not match."""
    for result in check_all():
        if not result.ok:
            raise ConfigError(
                f"SGLang does not match what KeepKV attaches to: {result.name}: {result.reason}. "
                f"Install sglang=={TESTED_SGLANG}, or start the server without --enable-keepkv"
            )
