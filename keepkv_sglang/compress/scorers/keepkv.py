"""KeepKV's own score: p_i s_hat_i with the window EMA of Eq. 8 (arXiv 2504.09936); for comparison only."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.window import Window

EMA_DECAY = 0.9
"""Eq. 8 is an EMA with bias correction whose alpha the paper does not state. Here the newest query has
weight 0.1 and each older one 0.9 times the next: about the last ten queries count."""


def keepkv(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: log(p_i s_hat_i), s_hat_i = EMA over the window queries that see token i of the un-normalised
    exp(l_qi), averaged over the q heads of the group; -inf for a token that no window query sees.

    In the log domain, since exp of raw logits overflows; the order is the same. `pool_kernel` is unused: no
    pooling in the paper. Differs from the paper: GQA is not discussed there, the mean over the group is ours.
    """
    ema = window.log_ema(EMA_DECAY)[None, :]

    def one_block(block: slice) -> torch.Tensor:
        weight = ema.masked_fill(window.hidden(block), -torch.inf)
        norm = torch.logsumexp(weight, dim=1).clamp(min=torch.finfo(ema.dtype).min)  # unseen: not NaN
        return torch.logsumexp(window.logits(block).add_(weight), dim=2) - norm + window.lv[:, block]

    return window.per_token(one_block)
