"""KeyDiff (arXiv 2504.15364): keeps the keys that are least like the average key. Needs no queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from keepkv_sglang.compress.window import Window


def keydiff(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: -cos(k_i, a), with the anchor a = mean over the span of k_j / |k_j|. A zero key scores 0.

    `pool_kernel` is unused: no pooling in the paper. Votes are unused as well: each slot counts once, as in
    the paper, whose cache has no merged slots. Differs from the paper: the anchor is the span's, not that of
    the whole cache, so that a span's entry does not depend on what stands before it.
    """
    unit = F.normalize(window.k, dim=2)
    anchor = F.normalize(unit.mean(dim=1, keepdim=True), dim=2)
    return -(unit * anchor).sum(dim=2)
