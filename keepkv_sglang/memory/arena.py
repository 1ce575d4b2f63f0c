"""The one bounded scratch memory for queries that compressions score with."""

from __future__ import annotations

import torch

ARENA_MAX_BYTES = 512 << 20  # on a CPU, and on a GPU that has little


class QueryArena:
    """Bounded scratch for the window queries of prompts and of coming decode compressions.

    queries: [layers, rows + 1, q_heads, head_dim] in the model's dtype; the last row, `spare`, belongs to nobody: a
    CUDA graph, which must write a row for every query, writes there what nobody wants. A request takes `window` rows
    and gives them back after its compression; one that does not fit waits for the next round.
    """

    def __init__(
        self, layers: int, rows: int, q_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.queries = torch.empty(layers, rows + 1, q_heads, head_dim, dtype=dtype, device=device)
        self._free = list(range(rows - 1, -1, -1))
        self.rows = self.spare = rows
        self.peak_rows = 0

    def take(self, rows: int) -> list[int] | None:
        """`rows` row numbers, or None when the arena is too full."""
        if rows > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(rows)]
        self.peak_rows = max(self.peak_rows, self.rows - len(self._free))
        return taken

    def give_back(self, rows: list[int]) -> None:
        self._free.extend(reversed(rows))
        assert len(self._free) <= self.rows, "arena rows given back twice"

    @property
    def free_rows(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        return self.queries.numel() * self.queries.element_size()
