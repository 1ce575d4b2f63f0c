"""TOVA (arXiv 2401.06104): the attention of the last query alone."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.window import Window


def tova(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: attention p_i exp(l_qi) / Z_q that the window's last query gives to token i, mean over the q heads
    of the group; -inf for a token that it does not see.

    `pool_kernel` is unused: no pooling in the paper. Differs from the paper: there the mean is over all heads of
    the layer and all heads keep the same tokens; a span is compressed once, not one token per step.
    """
    q, log_z = window.q[:, -window.group :], window.log_z[:, -window.group :]

    def one_block(block: slice) -> torch.Tensor:
        logits = torch.bmm(window.k[:, block], q.transpose(1, 2)) + window.lv[:, block, None]
        hidden = window.hidden(block)[:, -window.group :]
        attention = (logits - log_z[:, None, :]).masked_fill_(hidden, -torch.inf).exp_().mean(dim=2)
        return attention.masked_fill(hidden[:, 0], -torch.inf)

    return window.per_token(one_block)
