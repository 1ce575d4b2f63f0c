"""The window's queries and the references, each as a share: what either of them wants is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from keepkv_sglang.scoring.base import Window
from keepkv_sglang.scoring.rms import rms

WINDOW = 2.0
"""A share of the window's queries counts so many shares of the references'. Measured on development passwords: with 1
fewer are found; only the window (infinity) loses in KL at 20 % kept what the references bring."""


def window_references(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: max(2 w_i / sum_j w_j, r_i / sum_j r_j), w_i = sqrt(sum_q (p_i exp(l_qi) / Z_q)^2) over the window's
    queries that see token i, r_i likewise over the references (scoring/references.py); both pooled as in `snapkv`.

    `rms` takes one mean over all queries. There a word that only the question at the end of the prompt asks for is one
    of hundreds of wishes, and is dropped before what many references want a little. Not from a paper: the window is
    SnapKV's (arXiv 2404.14469), the root of squares that of Attention Matching (arXiv 2602.16284). With references
    alone, or with none, `rms`.
    """
    references, proper = window.parts()
    if references is None or proper is None:
        return rms(window, pool_kernel)
    return torch.maximum(WINDOW * _share(proper, pool_kernel), _share(references, pool_kernel))


def _share(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n], sum 1 over the span; zeros where the queries see nothing of it."""
    norm = window.received_norm()[:, None]
    score = F.avg_pool1d(norm, pool_kernel, 1, pool_kernel // 2, count_include_pad=False)[:, 0]
    return score / score.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
