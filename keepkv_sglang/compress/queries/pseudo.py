"""Queries for spans that no request is using: those of a fixed text, moved behind the span's end.

Window scores and query-based merge rules need queries, and a cached span that is compressed under memory
pressure has none. Any text gives usable ones (Expected Attention, arXiv 2510.00636, makes the same
observation and keeps their moments; keeping 32 queries as they are did better here, docs/log.md). The text is
fixed, so that no tenant's requests shape the cache of another.

1. Once, when the server starts: run a fixed text as a prompt of its own and keep the queries after RoPE of the
   tokens `calibration_rows` names.
2. For a span that ends before logical position `end`: `behind(layer, end)` are queries of a LayerInput whose
   q_index is n - 1 throughout. Scorer and merge rule are then the usual ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from keepkv_sglang.compress.queries.rotary import Rotary

SKIPPED_TOKENS = 4  # the first tokens' queries are unlike all others


def calibration_rows(tokens: int, w: int) -> list[int]:
    """w indices, ascending and evenly spread, into a text of `tokens` tokens; ValueError when it is too short."""
    if w < 1 or tokens - SKIPPED_TOKENS < w:
        raise ValueError(f"{w} queries from {tokens} tokens: at least {w + SKIPPED_TOKENS} tokens are needed")
    return [SKIPPED_TOKENS + i * (tokens - SKIPPED_TOKENS) // w for i in range(w)]


@dataclass(frozen=True)
class PseudoQueries:
    """q [L, w, Hq, D]: queries of L layers after RoPE, NOT scaled, any float dtype; position [w] int64: where
    they stood."""

    q: torch.Tensor
    position: torch.Tensor
    rotary: Rotary

    def behind(self, layer: int, end: int) -> torch.Tensor:
        """[w, Hq, D] in q's dtype: query j of layer (0 based) as it would be at position end + j.

        q_j(end + j) = R(end + j) R(t_j)^-1 q_j, t_j its own position (rotary.py). Mutates nothing.
        """
        q = self.q[layer]
        target = end + torch.arange(len(q))
        return self.rotary.turn(self.position, target, q.dtype, q.device)(q)
