"""Expected Attention (arXiv 2510.00636) as published: moments of the whole prompt's queries, at future positions.

Offline only: a server keeps the last queries, not all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from keepkv_sglang.scoring.base import Window
from keepkv_sglang.scoring.expected_attention import log_expected

SINKS = 4
"""The first tokens: always kept, outside the softmax, and their queries are outside the moments."""
FUTURE = 512
"""Positions behind the prompt over which the rotation is averaged (evaluate/future.py)."""


def expected_attention_full(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: `expected_attention` over the tokens from SINKS on; the sinks score above all of them.

    The window's queries must be those of the prompt's tokens from SINKS on, turned to the mean rotation of the next
    FUTURE positions (evaluate/future.py): that map is linear, so mean and covariance of the turned queries are the
    paper's R mu and R Sigma R^T. ValueError unless there is one for each of those tokens. `pool_kernel` is unused.

    Votes; otherwise differs from the paper in nothing but the epsilon beside the norm, 0 as in kvpress's default.
    """
    n, w = window.k.shape[1], window.position.shape[0]
    if w != n - SINKS or w < 1:
        raise ValueError(
            f"scorer 'expected_attention_full' needs the query of every token but the first {SINKS}, turned to future "
            f"positions, and for {n} tokens the window has {w} (offline only); use 'expected_attention' on a server"
        )
    scores = log_expected(window, SINKS)
    return F.pad(scores, (SINKS, 0), value=float(scores.max()) + 1)
