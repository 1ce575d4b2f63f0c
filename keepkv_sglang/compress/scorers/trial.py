"""Eight tokens on which a scorer of somebody else's is tried before a server uses it."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.window import Scorer, Window, observe


def trial_window(queries: bool = True) -> Window:
    """H = 2 kv heads, n = 8 tokens, D = 4, a window of 3 tokens with 2 q heads each (or none), float32."""
    k = torch.linspace(-1, 2, 2 * 8 * 4).sin().view(2, 8, 4)
    q = torch.linspace(0, 3, 2 * 6 * 4).cos().view(2, 6, 4) if queries else k.new_zeros(2, 0, 4)
    position = torch.arange(5, 8) if queries else torch.zeros(0, dtype=torch.int64)
    return observe(q, position, k, k.flip(1), k.new_zeros(2, 8), k.new_full((2, q.shape[1]), -torch.inf), 8)


def try_scorer(scorer: Scorer) -> None:
    """Raises ValueError unless the scorer gives [H, n] floats without NaN; passes on what the scorer raises."""
    for queries in (True, False) if not getattr(scorer, "needs_queries", True) else (True,):
        scores = scorer(trial_window(queries), 7)
        if not isinstance(scores, torch.Tensor) or scores.shape != (2, 8) or not scores.is_floating_point():
            found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise ValueError(f"it must return a float tensor [H, n] = (2, 8), not {found}")
        if scores.isnan().any():
            raise ValueError("it returned NaN")
