"""The state of KeepKV in one scheduler process: configuration, votes, arena, offsets and SGLang's pools.

There is one scheduler per process, so there is one Runtime (`current`). The attention backend hands over the pools
when the model runner builds it; `Scheduler.__init__` hands over the rest. Compression lives in compressor.py, timing
in hooks/, ownership of cached slots in radix/cache.py.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from keepkv_sglang.anchor import MessageBorder, message_border
from keepkv_sglang.calibrate import Calibration, rotary_of
from keepkv_sglang.config import ConfigError, KeepKVConfig
from keepkv_sglang.configurations import Configurations
from keepkv_sglang.eligibility import NotCompressed, why_not
from keepkv_sglang.policies import MERGE_RULES, SCORERS
from keepkv_sglang.protect import Protection, names_system
from keepkv_sglang.request import RequestState
from keepkv_sglang.scoring.rotary import Rotary
from keepkv_sglang.values import shown
from keepkv_sglang.votes import QueryArena, SlotTokens, VoteStore

logger = logging.getLogger("keepkv")

ARENA_WINDOWS = 64  # windows of the default size that fit at once
ARENA_MAX_BYTES = 512 << 20
STATE = "keepkv"  # attribute of SGLang's Req: its RequestState, or None
OFF = "keepkv_off"  # attribute of SGLang's Req: its NotCompressed, where STATE is None
REQUEST_KEY = "keepkv"  # key in sampling_params.custom_params


class Runtime:
    """Everything a scheduler process shares between hooks, backend and cache."""

    def __init__(self, config: KeepKVConfig) -> None:
        self.config = config
        # Last part of the namespace of what pressure.py merges; None: it merges nothing.
        merges = config.pressure != "off" and config.compresses and not config.counts_slots
        self.pressure_key = config.fingerprint() if merges else None
        self.scheduler: Any = None
        self.tree: Any = None
        self.allocator: Any = None
        self.req_to_token_pool: Any = None
        self.kv_pool: Any = None
        self.votes: VoteStore | None = None
        self.arena: QueryArena | None = None
        self.slot_tokens: SlotTokens | None = None
        self.offsets: torch.Tensor | None = None  # int64 [rows]: logical - physical
        self.scales: dict[int, float] = {}
        self.first_layer = 0
        self.rank = 0  # of tensor parallelism
        self.border: MessageBorder | None = None
        self.calibration: Calibration | None = None
        self.rotary: Rotary | None = None
        self.capacity = 0  # slots of the pool
        self.pool_limit = 1 << 62  # tokens from which a prompt cannot be in the pool uncompressed
        self.step_reserve = 0  # slots that the step being scheduled still has to allocate
        self.active_rows = 0
        self.check_at_idle = os.environ.get("KEEPKV_CHECK") == "1"
        self.checked_at = -1
        self.merge_flops = self.prefill_flops = 0.0  # pressure.worth_merging
        # (query rows, arena rows) of the forward about to run; the attention backend takes it
        self.capture: tuple[torch.Tensor, torch.Tensor] | None = None
        self.configurations = Configurations(config.configurations, config.fingerprint(), self.cached_configurations)
        self.running = 1  # requests in the batch that is about to run
        self.adder: Any = None  # SGLang's prefill adder of this round
        self.counters = {
            "compressions": 0,
            "skipped_no_room": 0,  # no slots beside the span
            "skipped_no_window": 0,  # no arena rows for a prompt's queries
            "skipped_reply_window": 0,  # no arena rows for a reply's queries
            "deferred": 0,  # due, and put off to the next step by step_tokens
            "parked": 0,  # rounds in which a chunk of a prompt found no slots and nobody was admitted
            "slots_freed": 0,
            "seconds": 0.0,  # of the compressions alone
            "hook_seconds": 0.0,  # of all that runs between steps: looking for due spans, compressing, publishing
            "published": 0,
            "entry_hits": 0,
            "retractions_published": 0,
            "mispublished": 0,
            "most_running": 0,  # requests in one decode batch
            "pressure_merges": 0,
            "pressure_tokens": 0,
            "pressure_seconds": 0.0,
        }

    # -- start-up -----------------------------------------------------------------------------------------------------

    def attach_model_runner(self, runner: Any) -> None:
        """Called by the attention backend: allocates votes (persistent) and the arena (scratch)."""
        pool = runner.token_to_kv_pool
        if not hasattr(pool, "get_key_buffer") or getattr(pool, "is_quantized_kv_cache", False):
            raise ConfigError(f"KeepKV cannot merge in a {type(pool).__name__}; use --kv-cache-dtype auto")
        self.kv_pool = pool
        self.first_layer, layers = pool.start_layer, pool.layer_num
        keys = pool.get_key_buffer(self.first_layer)
        if keys.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"KeepKV cannot merge keys of {keys.dtype}; use --kv-cache-dtype bfloat16")
        slots, kv_heads, head_dim = keys.shape
        self.rotary = rotary_of(runner.model)
        if self.rotary is None and self.config.references:
            logger.info("no reference queries: the model has no single rotary embedding")
        self.merge_flops = 2.0 * layers * kv_heads * head_dim
        self.prefill_flops = 2.0 * sum(weight.numel() for weight in runner.model.parameters())
        self.votes = VoteStore(layers, slots, kv_heads, keys.device)
        self.slot_tokens = SlotTokens(slots) if keys.is_cpu else None
        from sglang.srt.runtime_context import get_parallel

        self.rank = get_parallel().attn_tp_rank
        q_heads = runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        row_bytes = layers * q_heads * head_dim * runner.dtype.itemsize
        windows = ARENA_WINDOWS
        if self.config.span_tokens:  # a long prompt holds one window per piece until its last chunk
            windows = max(windows, 2 * runner.model_config.context_len // self.config.span_tokens)
        needed = self.queries_of(self.config)
        rows = max(needed, min(windows * needed, ARENA_MAX_BYTES // row_bytes - 1))
        self.arena = QueryArena(layers, rows, q_heads, head_dim, runner.dtype, keys.device)

    def attach_scheduler(self, scheduler: Any) -> None:
        """After Scheduler.__init__: the pools exist now."""
        self.scheduler = scheduler
        self.tree = scheduler.tree_cache
        self.allocator = scheduler.token_to_kv_pool_allocator
        self.req_to_token_pool = scheduler.req_to_token_pool
        if self.votes is None or not getattr(self.tree, "is_keepkv", False):
            raise ConfigError(
                "KeepKV's attention or radix-cache backend is not in use, although --enable-keepkv was given; "
                "leave out --attention-backend and --radix-cache-backend"
            )
        from keepkv_sglang.hooks.admission import raise_limits

        raise_limits(self, scheduler)
        table = self.req_to_token_pool.req_to_token
        self.offsets = torch.zeros(table.shape[0], dtype=torch.int64, device=table.device)
        tokenizer = getattr(scheduler, "tokenizer", None)
        self.border = message_border(tokenizer)
        if self.border is None and names_system(self.config.protect):
            logger.warning("--keepkv-protect system has no effect: the chat template shows no end of a message")
        if self.pressure_key is not None:
            self.calibration = Calibration.of(tokenizer, self.rotary)
        memory = self.memory()
        logger.info(
            "KeepKV is on: %s; votes %.1f MiB (%.2f %% of a 16-bit KV pool), arena %.1f MiB, message border %s",
            self.config,
            memory["votes_bytes"] / 2**20,
            100 * memory["persistent_share_of_16_bit_pool"],
            memory["arena_bytes"] / 2**20,
            self.border,
        )

    # -- per request --------------------------------------------------------------------------------------------------

    def state_of(self, req: Any) -> RequestState | None:
        """The request's state, or None when nothing of it is ever merged; `not_compressed` then says why.

        Resolved once, when the request arrives (hooks/admission.py). Raises ConfigError, that one time, for settings
        that the front end did not refuse.
        """
        if not hasattr(req, STATE):
            setattr(req, STATE, None)
            setattr(req, OFF, NotCompressed("settings", self.config.budget))
            self._resolve(req)
        state: RequestState | None = getattr(req, STATE)
        return state

    def _resolve(self, req: Any) -> None:
        config = self.request_config(req)
        reason = why_not(req, config)
        if reason is not None:
            setattr(req, OFF, NotCompressed(reason, config.budget))
            return
        namespace = (req.extra_key, req.cache_salt, req.lora_id, config.fingerprint())
        protection = self.protection_of(config, req.origin_input_ids)
        state = RequestState(config, namespace, len(req.origin_input_ids), protection)
        self.configurations.admit(namespace[-1], state)
        setattr(req, STATE, state)

    @staticmethod
    def not_compressed(req: Any) -> NotCompressed:
        """Why this request has no state."""
        off: NotCompressed = getattr(req, OFF)
        return off

    def request_config(self, req: Any) -> KeepKVConfig:
        """Flags with the request's own values. Raises ConfigError."""
        params = req.sampling_params.custom_params if req.sampling_params is not None else None
        if params is not None and not isinstance(params, dict):
            raise ConfigError(f"custom_params must be an object, not {shown(params)}")
        return self.config.with_request((params or {}).get(REQUEST_KEY))

    def cached_configurations(self) -> set[str]:
        """Fingerprints that spans of the cache have."""
        return {namespace[-1] for namespaces in self.tree.namespaces.values() for namespace in namespaces}

    def protection_of(self, config: KeepKVConfig, prompt: Any) -> Protection:
        """What this configuration marks in a prompt (array('q') of token ids)."""
        return Protection.of(config.protect, config.fair, prompt, self.border)

    def queries_of(self, config: KeepKVConfig) -> int:
        """Most arena rows that a prompt's span takes: its window and its references."""
        return config.window + (config.references if self.rotary is not None else 0)

    def room_for_replies(self) -> bool:
        """Replies may use half of the arena: a prompt has one chance to be scored, a reply one per interval."""
        assert self.arena is not None
        return 2 * self.arena.free_rows > self.arena.rows

    def reply_rows(self, config: KeepKVConfig) -> int:
        """Arena rows that one reply may hold: its window, and no more than an equal share of the replies' half."""
        assert self.arena is not None
        share = self.arena.rows // (2 * max(1, self.running))
        return max(1, min(config.window, config.interval, share))

    @staticmethod
    def chunk_tokens(scheduler: Any) -> int:
        """Tokens of a prefill chunk; 0 when chunked prefill is off."""
        size = scheduler.chunked_prefill_size
        return size if size is not None and size > 0 else 0

    def too_long(self, req: Any) -> bool:
        """Whether the request's tokens cannot all be in the pool at once: then it is compressed between chunks."""
        return len(req.origin_input_ids) + len(req.output_ids) >= self.pool_limit

    def set_offset(self, req: Any, state: RequestState, offset: int) -> None:
        """Sets logical - physical for the request's row, on the host and on the device."""
        self.active_rows += (offset != 0) - (state.offset != 0)
        state.offset = offset
        if req.kv.req_pool_idx is not None and self.offsets is not None:
            self.offsets[req.kv.req_pool_idx] = offset

    def forget_row(self, req: Any) -> None:
        """The row goes back to the pool: clear its offset and give the arena rows back. Safe to call twice."""
        state = getattr(req, STATE, None)
        if state is None:
            return
        if state.offset:
            self.set_offset(req, state, 0)
        self.drop_plan(state)
        state.admitted = False
        state.own, state.merged_tokens = [], 0
        state.move_tail(0, 0)

    def drop_plan(self, state: RequestState) -> None:
        """Nothing more of the request is compressed as planned; its arena rows go back."""
        assert self.arena is not None
        self.arena.give_back(state.drop_windows())
        state.plan = []

    # -- numbers ------------------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, float]:
        """Bytes beside the KV pool.

        Persistent and growing with it: votes, offsets. Persistent and fixed: calibration. Scratch: arena, merging.
        """
        from keepkv_sglang.compressor import SCRATCH_BYTES

        assert self.votes is not None and self.arena is not None and self.offsets is not None
        keys = self.kv_pool.get_key_buffer(self.first_layer)
        pool16 = 2 * 2 * keys.numel() * self.kv_pool.layer_num
        calibration = self.calibration.nbytes if self.calibration is not None else 0
        slot_tokens = self.slot_tokens.nbytes if self.slot_tokens is not None else 0
        persistent = self.votes.nbytes + self.offsets.numel() * 8 + slot_tokens
        return {
            "votes_bytes": self.votes.nbytes,
            "offsets_bytes": self.offsets.numel() * 8,
            "slot_tokens_bytes": slot_tokens,
            "calibration_bytes": calibration,
            "persistent_share_of_16_bit_pool": persistent / pool16,
            "arena_bytes": self.arena.nbytes,
            "arena_rows": self.arena.rows,
            "arena_free_rows": self.arena.free_rows,
            "arena_peak_rows": self.arena.peak_rows,
            "merge_scratch_bytes": SCRATCH_BYTES,
        }

    def snapshot(self) -> dict[str, Any]:
        """For /server_info: configuration, counters, memory, and the pool's accounting."""
        from dataclasses import asdict

        return {
            "config": asdict(self.config),
            "counters": {**self.counters, "refused_configurations": self.configurations.refused},
            "configurations": len(self.configurations),
            "memory": self.memory(),
            "entries": len(self.tree.spans),
            "entry_slots": self.tree.spans.evictable_slots + self.tree.spans.protected_slots,
            "total_slots": int(self.allocator.size),
            "available_slots": int(self.allocator.available_size()),
            "evictable_slots": int(self.tree.evictable_size()),
            "protected_slots": int(self.tree.protected_size()),
            "active_rows": self.active_rows,
        }


_runtime: Runtime | None = None


def start(config: KeepKVConfig) -> Runtime:
    """Called once per scheduler process, before SGLang builds its pools."""
    global _runtime
    # Imported now, in the process that will run them: not while a request waits, and not with an error then.
    SCORERS.get(config.scorer)
    MERGE_RULES.get(config.merge)
    _runtime = Runtime(config)
    return _runtime


def current() -> Runtime:
    """The process's runtime. Raises RuntimeError where KeepKV was not switched on."""
    if _runtime is None:
        raise RuntimeError("KeepKV is not switched on in this process; start the server with --enable-keepkv")
    return _runtime


def active() -> Runtime | None:
    """The process's runtime, or None where KeepKV is off: hooks then do nothing."""
    return _runtime if _runtime is not None and _runtime.config.enabled and _runtime.scheduler is not None else None


def configured() -> KeepKVConfig | None:
    """The process's configuration from the moment Scheduler.__init__ began; None in other processes."""
    return _runtime.config if _runtime is not None else None
