"""The state of KeepKV in one scheduler process: configuration, votes, arena, offsets and SGLang's pools.

There is one scheduler per process, so there is one Runtime (`current`). attach.py fills it in: the attention backend
hands over the pools when the model runner builds it, `Scheduler.__init__` the rest.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.compress.registry import MERGE_RULES, SCORERS
from keepkv_sglang.memory.arena import ARENA_MAX_BYTES, QueryArena
from keepkv_sglang.memory.calibration import Calibration
from keepkv_sglang.memory.cells import PackedCells
from keepkv_sglang.memory.votes import SlotTokens, VoteStore
from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.runtime.originals import Originals
from keepkv_sglang.runtime.requests import STATE, Requests
from keepkv_sglang.runtime.skips import SkipWatch
from keepkv_sglang.runtime.summary import Summary
from keepkv_sglang.runtime.watched import Watched
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.turn.limits import Limits
from keepkv_sglang.turn.queries import drop_plan
from keepkv_sglang.turn.state import RequestState


class Runtime:
    """What a scheduler process shares between hooks, backend and cache."""

    # set by attach.py, before any request comes
    scheduler: Any
    allocator: Any
    req_to_token_pool: Any
    offsets: torch.Tensor  # int64 [rows]: logical - physical
    kv_pool: Any
    votes: VoteStore
    arena: QueryArena
    limits: Limits
    requests: Requests

    def __init__(self, config: KeepKVConfig) -> None:
        self.config = config
        # Last part of the namespace of what pressure.py merges; None: it merges nothing.
        merges = config.pressure != "off" and config.compresses and not config.counts_slots
        self.pressure_key = config.fingerprint() if merges else None
        self.attached = False  # to a scheduler
        self.tree: Any = None
        self.slot_tokens: SlotTokens | None = None
        self.cells: PackedCells | None = None  # where attention reads packed spans
        self.originals: Originals | None = None  # where the server keeps them
        self.scales: dict[int, float] = {}
        self.first_layer = 0
        self.rank = 0  # of tensor parallelism
        self.arena_most = ARENA_MAX_BYTES  # hooks/pool_size.py decides it where SGLang sizes the pool
        self.calibration: Calibration | None = None
        self.rotary: Rotary | None = None
        self.step_reserve = 0  # slots that the step being scheduled still has to allocate
        self.active_rows = 0
        self.check_at_idle = os.environ.get("KEEPKV_CHECK") == "1"
        self.checked_at = -1
        self.merge_flops = self.prefill_flops = 0.0  # pressure.worth_merging
        # (query rows, arena rows) of the forward about to run; the attention backend takes it
        self.capture: tuple[torch.Tensor, torch.Tensor] | None = None
        # of the same forward, a prefill: (first query row, number of queries, stream.Reading) of each streamed request
        self.readings: list[tuple[int, int, Any]] = []
        # Whether the rows of the forward about to run hold compressed slots; the attention backend takes it, too.
        self.voted = True
        self.adder: Any = None  # SGLang's prefill adder of this round
        self.counters = Counters()
        self.skips = SkipWatch()
        self.summary = Summary()
        self.watched: Watched | None = None  # None: metrics are off
        self.metrics: Any = None  # observe/metrics.py, where they are on

    # -- rows ---------------------------------------------------------------------------------------------------------

    def set_offset(self, req: Any, state: RequestState, offset: int) -> None:
        """Sets logical - physical for the request's row, on the host and on the device."""
        self.active_rows += (offset != 0) - (state.offset != 0)
        state.offset = offset
        if req.kv.req_pool_idx is not None:
            self.offsets[req.kv.req_pool_idx] = offset

    def forget_row(self, req: Any) -> None:
        """The row goes back to the pool: clear its offset and give the arena rows back. Safe to call twice."""
        state = getattr(req, STATE, None)
        if state is None:
            return
        if state.compression is not None:
            state.compression.drop()
        if state.offset:
            self.set_offset(req, state, 0)
        drop_plan(self.limits, state)
        if self.originals is not None:
            self.originals.forget(state, self.allocator)
        state.admitted = False
        state.own, state.merged_tokens = [], 0
        state.move_tail(0, 0)


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
    return _runtime if _runtime is not None and _runtime.config.enabled and _runtime.attached else None


def configured() -> KeepKVConfig | None:
    """The process's configuration from the moment Scheduler.__init__ began; None in other processes."""
    return _runtime.config if _runtime is not None else None
