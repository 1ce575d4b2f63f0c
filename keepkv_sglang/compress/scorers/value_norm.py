"""Value-aware pruning (VATP, arXiv 2406.12335): attention times the size of what it brings, the L1 norm of v."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.window import Window


def value_norm(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: |v_i|_1 times the attention received, mean over the window queries that see token i, with votes.

    `pool_kernel` is unused: no pooling in the paper. Differs from the paper: attention is that of the window (the
    paper multiplies H2O's sum or Scissorhands' count), and the sinks are the policy's, not 20 tokens.
    """
    return window.mean_received() * window.v.abs().sum(dim=2)
