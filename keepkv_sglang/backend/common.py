"""What every attention backend of ours does beside attention: votes of written slots, window queries, layer checks."""

from __future__ import annotations

from typing import Any

import torch

from keepkv_sglang import flags, refuse, runtime


class VoteLayers:
    """The per-layer part that backends share. Without KeepKV in this process (`runtime` is None) it does nothing."""

    def __init__(self, runner: Any) -> None:
        """Hands SGLang's model runner to the process's Runtime, which allocates votes and the query arena.

        RuntimeError when KeepKV is on and its hook did not run in this process.
        """
        self.runtime: runtime.Runtime | None = None
        self.capture: tuple[torch.Tensor, torch.Tensor] | None = None
        self._checked: set[int] = set()
        config = runtime.configured()
        if config is None and flags.config_of(runner.server_args).enabled:
            raise RuntimeError("KeepKV's hook on Scheduler.__init__ did not run in this process; see `keepkv check`")
        if config is not None and config.enabled:
            self.runtime = runtime.current()
            self.runtime.attach_model_runner(runner)

    def begin(self) -> None:
        """Once per forward: takes over which of its queries are kept (runtime.capture)."""
        if self.runtime is not None:
            self.capture, self.runtime.capture = self.runtime.capture, None

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
        assert votes is not None and arena is not None
        votes.reset(index, written)
        if self.capture is not None:
            query_rows, arena_rows = self.capture
            arena.queries[index, arena_rows] = q[query_rows].to(arena.queries.dtype)
        return votes.log_votes[index]
