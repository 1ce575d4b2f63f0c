"""Expected Attention (arXiv 2510.00636) as published: moments of the whole prompt's queries, at future positions.

Offline only: a server keeps the last queries, not all of them.
"""

from __future__ import annotations

import torch

from keepkv_sglang.compress.scorers.expected_attention import log_expected
from keepkv_sglang.compress.window import Window

SINKS = 4
"""The first tokens: always kept, outside the softmax, and their queries are outside the moments."""
FUTURE = 512
"""Positions behind the prompt over which the rotation is averaged (evaluate/future.py)."""


def expected_attention_full(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: `expected_attention` over the tokens from SINKS on; the sinks score above all of them.

    The window's queries stand for the future: those of the prompt's tokens from SINKS on, turned to the mean rotation
    of the next FUTURE positions, or any with the same mean and covariance per head (evaluate/future.py). That map is
    linear, so these are the paper's moments R mu and R Sigma R^T. They see every token: ValueError when the window's
    positions are not all n - 1, as of queries that nobody has moved. `pool_kernel` is unused.

    Votes; otherwise differs from the paper in nothing but the epsilon beside the norm, 0 as in kvpress's default.
    """
    n = window.k.shape[1]
    if n <= SINKS or not (len(window.position) and all(place == n - 1 for place in window.places)):
        raise ValueError(
            "scorer 'expected_attention_full' needs queries moved behind the span (offline only: evaluate/future.py) "
            f"and more than {SINKS} tokens; use 'expected_attention' with the queries of a window"
        )
    scores = log_expected(window, SINKS)
    above = scores.amax(dim=1, keepdim=True) + 1
    return torch.cat((above.expand(-1, SINKS), scores), dim=1)
