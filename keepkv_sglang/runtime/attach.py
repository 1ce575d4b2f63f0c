"""How a Runtime gets SGLang's pools, and memory of its own beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from keepkv_sglang.compress.select import UNIFORM
from keepkv_sglang.memory.arena import ARENA_MAX_BYTES, QueryArena
from keepkv_sglang.memory.calibration import Calibration, rotary_of
from keepkv_sglang.memory.cells import PackedCells
from keepkv_sglang.memory.originals import BLOCK_TOKENS, BlockLayout, BlockStore, Staging, blocks_of
from keepkv_sglang.memory.votes import SlotTokens, VoteStore
from keepkv_sglang.runtime.originals import Originals
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import Requests
from keepkv_sglang.runtime.unpack import HostSide
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig
from keepkv_sglang.settings.protect import names_system
from keepkv_sglang.turn.anchor import message_border
from keepkv_sglang.turn.limits import Limits

logger = logging.getLogger("keepkv")

ARENA_WINDOWS = 64  # windows of the default size that fit at once
ARENA_SHARE = 0.04  # of what a GPU has for the pool: an 8B's 64 windows in 80 GB take half of that


@dataclass(frozen=True)
class HostMemory:
    """free(): bytes that this machine, or container, can still give. pinned(shape): uint8 that a GPU reads and writes
    where it lies."""

    free: Callable[[], int]
    pinned: Callable[[tuple[int, int]], torch.Tensor]


def model_runner(rt: Runtime, runner: Any, host: HostMemory, rank: int, ranks: int, reads_packed: bool = False) -> None:
    """Called by the attention backend: allocates votes (persistent) and the arena (scratch).

    host: where originals may go. rank, ranks: of attention's tensor parallelism. reads_packed: whether attention reads
    packed spans. Raises ConfigError for a pool whose
    keys cannot be merged.
    """
    pool = runner.token_to_kv_pool
    if not hasattr(pool, "get_key_buffer") or getattr(pool, "is_quantized_kv_cache", False):
        raise ConfigError(f"KeepKV cannot merge in a {type(pool).__name__}; use --kv-cache-dtype auto")
    rt.kv_pool = pool
    rt.first_layer, layers = pool.start_layer, pool.layer_num
    keys = pool.get_key_buffer(rt.first_layer)
    if keys.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"KeepKV cannot merge keys of {keys.dtype}; use --kv-cache-dtype bfloat16")
    slots, kv_heads, head_dim = keys.shape
    rt.rotary = rotary_of(runner.model)
    if rt.rotary is None and rt.config.references:
        logger.info("no reference queries: the model has no single rotary embedding")
    rt.merge_flops = 2.0 * layers * kv_heads * head_dim
    rt.prefill_flops = 2.0 * sum(weight.numel() for weight in runner.model.parameters())
    rt.votes = VoteStore(layers, slots, kv_heads, keys.device)
    rt.slot_tokens = SlotTokens(slots) if keys.is_cpu else None
    rt.cells = cells(rt, reads_packed)
    rt.originals = originals(rt, host, runner.model_config.context_len, ranks)
    rt.rank = rank
    q_heads = runner.model_config.num_attention_heads // ranks
    row_bytes = layers * q_heads * head_dim * runner.dtype.itemsize
    references = rt.rotary is not None
    rows = arena_rows(rt.config, references, runner.model_config.context_len, rt.arena_most // row_bytes - 1)
    share_arena(rt, QueryArena(layers, rows, q_heads, head_dim, runner.dtype, keys.device), references)


def cells(rt: Runtime, reads_packed: bool) -> PackedCells | None:
    """Where spans can be packed; else every head keeps the same number of tokens, whatever --keepkv-heads says.

    On a GPU only where the server's heads are not uniform: a graph's attention would pay for spans that no request of
    its own may then ask for (docs/flags.md)."""
    layers = range(rt.first_layer, rt.first_layer + rt.kv_pool.layer_num)
    keys = [rt.kv_pool.get_key_buffer(layer) for layer in layers]
    values = [rt.kv_pool.get_value_buffer(layer) for layer in layers]
    on_cpu, found, why = keys[0].is_cpu, None, "attention here does not read packed spans"
    if rt.config.heads == UNIFORM and not on_cpu:
        return None
    try:
        found = PackedCells.of(keys, values, rt.votes.log_votes) if reads_packed else None
        if found is not None and not on_cpu:
            _ = found.layers.offsets  # what the kernels of a GPU ask of the layers' places
            logger.warning(
                "--keepkv-heads %s: its kernels have not run on a GPU where KeepKV is developed (docs/gpu.md). Compare "
                "answers and times with those of --keepkv-heads uniform before you rely on it.",
                rt.config.heads,
            )
    except ValueError as error:
        found, why = None, str(error)
    if found is None and rt.config.heads != UNIFORM:
        logger.info("--keepkv-heads %s: every head keeps the same number of tokens, %s", rt.config.heads, why)
    return found


def originals(rt: Runtime, host: HostMemory, context_len: int, ranks: int) -> Originals | None:
    """Host memory for originals, where the server wants them; ConfigError where it cannot be had. ranks: that share the
    machine."""
    config, layers = rt.config, rt.kv_pool.layer_num
    if not config.keeps_originals:
        return None
    every = range(rt.first_layer, rt.first_layer + layers)
    all_keys = [rt.kv_pool.get_key_buffer(layer) for layer in every]
    all_values = [rt.kv_pool.get_value_buffer(layer) for layer in every]
    keys, values = all_keys[0], all_values[0]
    codec = "native" if config.host_dtype == "auto" else config.host_dtype
    layout = BlockLayout(codec, keys.shape[1], keys.shape[2], values.shape[2], keys.dtype)
    blocks = blocks_of(layout, layers, config.host_ratio, config.host_size, len(keys) - 1)
    if not blocks:
        raise ConfigError("--keepkv-host-size is too small for one block of originals; use a larger one")
    staging = None
    if config.streams_originals and keys.is_cpu:
        staging = Staging(layout, Staging.tokens_for(layout, context_len))
    size = blocks * layers * layout.block_bytes + (staging.nbytes if staging is not None else 0)
    free = host.free() // ranks
    if size > free:
        raise ConfigError(
            f"originals need {size / 1e9:.2f} GB of host memory and {free / 1e9:.2f} GB are free; use a smaller "
            "--keepkv-host-ratio or --keepkv-host-size, or --keepkv-host-dtype int4"
        )
    logger.info(
        "originals of %d tokens in %.2f GB of host memory (%s, %.0f bytes per token), on this rank",
        blocks * BLOCK_TOKENS, size / 1e9, codec, layers * layout.block_bytes / BLOCK_TOKENS,
    )  # fmt: skip
    store = BlockStore(layout, layers, blocks, None if keys.is_cpu else host.pinned)
    if not keys.is_cpu and not store.works_on(keys.device):
        raise ConfigError("this GPU does not read back what it writes into host memory; leave out --keepkv-host-ratio")
    return Originals(store, all_keys, all_values, rt.counters, staging)


def arena_most(available: int, on_gpu: bool) -> int:
    """Bytes that the arena may take of `available` ones for pool and arena; never more than half of them."""
    return min(max(ARENA_MAX_BYTES, int(ARENA_SHARE * available) if on_gpu else 0), available // 2)


def arena_rows(config: KeepKVConfig, references: bool, context_len: int, most: int) -> int:
    """Rows of the arena: ARENA_WINDOWS of the largest set that a span takes, at most `most`, at least one set."""
    needed = config.window + (config.references if references else 0)
    windows = ARENA_WINDOWS
    if config.span_tokens:  # a long prompt holds one window per piece until its last chunk
        windows = max(windows, 2 * context_len // config.span_tokens)
    return max(needed, min(windows * needed, most))


def share_arena(rt: Runtime, arena: QueryArena, references: bool) -> None:
    """The arena, and the limits that say who gets how much of it."""
    rt.arena = arena
    rt.limits = Limits(arena, rt.counters, references=references)


def scheduler(rt: Runtime, sglang_scheduler: Any) -> None:
    """After Scheduler.__init__: the pools exist now. Raises ConfigError where a backend of ours is not in use."""
    if not hasattr(rt, "votes") or not getattr(sglang_scheduler.tree_cache, "is_keepkv", False):
        raise ConfigError(
            "KeepKV's attention or radix-cache backend is not in use, although --enable-keepkv was given; "
            "leave out --attention-backend and --radix-cache-backend"
        )
    rt.scheduler = sglang_scheduler
    tokenizer = getattr(sglang_scheduler, "tokenizer", None)
    rt.limits.border = message_border(tokenizer)
    if rt.limits.border is None and names_system(rt.config.protect):
        logger.warning("--keepkv-protect system has no effect: the chat template shows no end of a message")
    size = sglang_scheduler.chunked_prefill_size
    rt.limits.chunk_tokens = size if size is not None and size > 0 else 0
    pools(
        rt, sglang_scheduler.tree_cache, sglang_scheduler.token_to_kv_pool_allocator, sglang_scheduler.req_to_token_pool
    )
    if rt.pressure_key is not None:
        rt.calibration = Calibration.of(tokenizer, rt.rotary)


def pools(rt: Runtime, tree: Any, allocator: Any, req_to_token_pool: Any) -> None:
    """SGLang's cache and pools; the cache asks `rt.requests` about requests from now on, and the hooks are active."""
    rt.tree, rt.allocator, rt.req_to_token_pool = tree, allocator, req_to_token_pool
    table = req_to_token_pool.req_to_token
    rt.offsets = torch.zeros(table.shape[0], dtype=torch.int64, device=table.device)
    rt.requests = Requests(rt.config, rt.limits, rt.counters, rt.pressure_key, tree.configurations)
    tree.requests = rt.requests
    if tree.disable:  # --disable-radix-cache: nothing is found again
        rt.originals = None
    if rt.originals is not None:
        tree.host = HostSide(rt)
    rt.attached = True
