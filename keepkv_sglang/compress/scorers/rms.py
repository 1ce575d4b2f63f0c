"""Root mean square of attention (Attention Matching, arXiv 2602.16284), with SnapKV's pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from keepkv_sglang.compress.window import Window


def rms(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: sqrt((1 / |Q_i|) sum_{q in Q_i} (p_i exp(l_qi) / Z_q)^2), Q_i = queries that see token i, times G q
    heads; then the mean over the `pool_kernel` tokens around i, as `snapkv`.

    A token that few queries want much counts more than with a mean: with reference queries from all over the prompt,
    few want any one thing. Differs from the paper: pooling; votes.
    """
    score = window.received_norm() / window.viewers().sqrt()
    return F.avg_pool1d(score[:, None], pool_kernel, 1, pool_kernel // 2, count_include_pad=False)[:, 0]
