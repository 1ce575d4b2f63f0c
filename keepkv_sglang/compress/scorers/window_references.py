"""The window's queries and the references, each as a share: what either of them wants is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from keepkv_sglang.compress.scorers.rms import rms
from keepkv_sglang.compress.window import Window

WINDOW = 2.0
"""A share of the window's queries counts so many shares of the references'. With 1 fewer development passwords are
found, with 4 KL at 10 % kept is worse."""


def window_references(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: max(2 w_i / sum_j w_j, r_i / sum_j r_j), w_i = sqrt(sum_q g_q (p_i exp(l_qi) / Z_q)^2) over the window's
    queries that see token i, g_q = 2^(-age / 4), age in tokens before the newest; r_i likewise over the references
    (compress/queries/references.py), g_q = 1; both pooled as in `snapkv`.

    `rms` takes one mean over all queries. There a word that only the question at the end of the prompt asks for is one
    of hundreds of wishes, and is dropped before what many references want a little. Not from a paper: the window is
    SnapKV's (arXiv 2404.14469), its decay like the EMA of KeepKV's Eq. 8 (arXiv 2504.09936), the root of squares that
    of Attention Matching (arXiv 2602.16284). With references alone, or with none, `rms`.
    """
    norms = window.norms()
    if norms is None:
        return rms(window, pool_kernel)
    references, proper = norms
    return torch.maximum(WINDOW * _share(proper, pool_kernel), _share(references, pool_kernel))


def _share(norm: torch.Tensor, pool_kernel: int) -> torch.Tensor:
    """[H, n], sum 1 over the span; zeros where the queries see nothing of it."""
    score = F.avg_pool1d(norm[:, None], pool_kernel, 1, pool_kernel // 2, count_include_pad=False)[:, 0]
    return score / score.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
