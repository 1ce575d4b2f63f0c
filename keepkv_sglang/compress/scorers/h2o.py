"""H2O (arXiv 2306.14048): attention summed over every query. Offline only: a server keeps the last queries only."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.window import Window


def h2o(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: attention, with votes, that token i has received from all n queries of the span and all q heads of
    the group (the paper's accumulated score). ValueError unless the window holds every query of the span, in order.

    `pool_kernel` is unused: no pooling in the paper. Differs from the paper: a span is compressed once, not one
    token per step; the recent half of the budget is SpanPolicy.recent.
    """
    n, w = window.k.shape[1], window.position.shape[0]
    if w != n or not window.places == list(range(n)):
        raise ValueError(
            f"scorer 'h2o' needs the attention of every query, and of {n} tokens the window has {w} queries: pass the "
            "queries of the whole span (offline only), or use a scorer of the window such as 'snapkv'"
        )
    return window.received()
