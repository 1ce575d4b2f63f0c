"""Key norm (arXiv 2406.11430): keeps the keys with the smallest L2 norm. Needs no queries."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.window import Window


def knorm(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: -|k_i|_2. RoPE does not change a norm.

    `pool_kernel` is unused: no pooling in the paper. Votes are unused as well: each slot counts once. Differs from
    the paper: it leaves the first two layers whole; here every layer is compressed.
    """
    return -window.k.norm(dim=2)
