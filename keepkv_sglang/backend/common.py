"""What every attention backend of ours does beside attention: votes of written slots, window queries, layer checks."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.host_memory import available_host_memory_bytes
from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator, alloc_with_host_register
from sglang.srt.runtime_context import get_parallel

from keepkv_sglang.kernels import choose
from keepkv_sglang.runtime import attach, process
from keepkv_sglang.start import flags, refuse


def _host_memory() -> attach.HostMemory:
    """As SGLang's host cache takes it: a container's limit counts, and memory is registered with the GPU, since torch
    would round gigabytes up."""

    def pinned(shape: tuple[int, int]) -> torch.Tensor:
        return alloc_with_host_register(shape, torch.uint8, "cpu", pin_memory=True, allocator=HostTensorAllocator())

    return attach.HostMemory(lambda: available_host_memory_bytes(allow_cgroup_fallback=True), pinned)


class VoteLayers:
    """The per-layer part that backends share. Without KeepKV in this process (`runtime` is None) it does nothing."""

    def __init__(self, runner: Any, reads_packed: bool = False) -> None:
        """Hands SGLang's model runner to the process's Runtime, which allocates votes and the query arena.
        reads_packed: whether the backend attends to packed spans.

        RuntimeError when KeepKV is on and its hook did not run in this process; what choose.prepare raises.
        """
        self.runtime: process.Runtime | None = None
        self.capture: tuple[torch.Tensor, torch.Tensor] | None = None
        self.readings: list[tuple[int, int, Any]] = []
        self.voted = True
        # int64 [most tokens]: the arena row of each query of a graph, at an address that graphs remember
        self._graph_rows: torch.Tensor | None = None
        self.graph_rows: torch.Tensor | None = None  # the same while a graph is captured or runs
        self._checked: set[int] = set()
        config = process.configured()
        if config is None and flags.config_of(runner.server_args).enabled:
            raise RuntimeError("KeepKV's hook on Scheduler.__init__ did not run in this process; see `keepkv check`")
        if config is not None and config.enabled:
            choose.prepare(torch.device(runner.device))
            self.runtime = process.current()
            parallel = get_parallel()
            ranks = parallel.attn_tp_rank, parallel.attn_tp_size
            attach.model_runner(self.runtime, runner, _host_memory(), *ranks, reads_packed=reads_packed)

    def begin(self) -> None:
        """Once per forward: takes over which of its queries are kept, whose history is streamed, and whether any of its
        rows has votes."""
        self.graph_rows = None
        if self.runtime is not None:
            self.capture, self.runtime.capture = self.runtime.capture, None
            self.readings, self.runtime.readings = self.runtime.readings, []
            self.voted, self.runtime.voted = self.runtime.voted, True

    def allocate_graph_rows(self, tokens: int) -> None:
        """Once, before a CUDA graph of up to so many tokens is captured."""
        assert self.runtime is not None
        arena = self.runtime.arena
        self._graph_rows = torch.full((tokens,), arena.spare, dtype=torch.int64, device=arena.queries.device)

    def begin_graph(self) -> None:
        """As begin(), before a decode graph is captured or replayed. A replay runs no Python: it
        copies every query, to the row that it reads at a fixed address; what nobody wants goes to the arena's spare
        row."""
        self.begin()
        assert self.runtime is not None and self._graph_rows is not None
        self._graph_rows.fill_(self.runtime.arena.spare)
        if self.capture is not None:
            query_rows, arena_rows = self.capture
            self._graph_rows[query_rows] = arena_rows
        self.graph_rows = self._graph_rows

    def index(self, layer: Any) -> int:
        """The layer's number in votes and arena. Checks the layer the first time: ConfigError for what our kernels do
        not compute."""
        if layer.layer_id not in self._checked:
            refuse.check_layer(layer)
            self._checked.add(layer.layer_id)
            if self.runtime is not None:
                self.runtime.scales[layer.layer_id] = layer.scaling
        return layer.layer_id - (self.runtime.first_layer if self.runtime is not None else 0)

    def before(self, q: torch.Tensor, layer: Any, written: torch.Tensor) -> torch.Tensor | None:
        """Slots `written` [T] stand for one token each again; queries q [T, Hq, D] that a compression will score with
        go into the arena. Returns log_votes float32 [slots, kv_heads], or None without KeepKV."""
        index = self.index(layer)
        if self.runtime is None:
            return None
        votes, arena = self.runtime.votes, self.runtime.arena
        votes.reset(index, written)
        if self.graph_rows is not None:
            arena.queries[index].index_copy_(0, self.graph_rows[: len(q)], q.to(arena.queries.dtype))
        elif self.capture is not None:
            query_rows, arena_rows = self.capture
            arena.queries[index, arena_rows] = q[query_rows].to(arena.queries.dtype)
        return votes.log_votes[index]
