"""G-KV (arXiv 2512.00504): the decayed maximum of past scores, so that one moment of attention is remembered."""

from __future__ import annotations

import math

import torch

from keepkv_sglang.compress.window import Window

DECAY = 0.8
"""alpha of the paper's global score."""


def gkv(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: log of max over the window's queries j that see token i of

    DECAY^age_j a_ji / max_i' a_ji',   a_ji = max over the q heads of the group of p_i exp(l_ji) / Z_j;

    age 0 is the last query. -inf for a token that no query sees. The logarithm, since sharp attention would
    underflow; the order is the same. `pool_kernel` is unused: pooling is an option there, off by default.

    Differs from the paper: its global score F_t = max(alpha F_{t-1}, S_t / max S_t) has one step per compression,
    S_t being the mean over the queries since the last; a span is compressed once here, so every query of the
    window is a step. R-KV's redundancy term, which the paper can add, is left out.
    """
    w, group = window.position.shape[0], window.group

    def log_attention(block: slice) -> torch.Tensor:  # [H, b, w]
        x = window.logits(block).add_(window.lv[:, block, None]).sub_(window.log_z[:, None, :])
        x = x.masked_fill_(window.hidden(block), -torch.inf)
        return x.unflatten(2, (w, group)).amax(dim=3)

    top = torch.stack([log_attention(block).amax(dim=1) for block in window.blocks()]).amax(dim=0)
    age = torch.arange(w - 1, -1, -1, device=top.device, dtype=top.dtype)
    shift = (age * math.log(DECAY) - top)[:, None, :]
    return window.per_token(lambda block: (log_attention(block) + shift).amax(dim=2))
