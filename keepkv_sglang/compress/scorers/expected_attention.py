"""Expected Attention (arXiv 2510.00636): attention under a normal distribution of queries, times the norm of v."""

from __future__ import annotations

import math

import torch

from keepkv_sglang.compress.window import Window


def expected_attention(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: log of |v_i|_2 mean_g softmax_i(log p_i + mu_g.k_i + k_i^T Sigma_g k_i / 2), with the mean mu_g and
    the covariance Sigma_g of the window's queries of q head g (divided by w; scale included).

    E[exp(q.k)] = exp(mu.k + k^T Sigma k / 2) for normal q. mu.k_i and k_i^T Sigma k_i are mean and variance of the
    logits of token i over the window, so no D x D matrix is formed. Future queries see every token: no causal
    mask. The logarithm, since the variance term can be large; the order is the same. `pool_kernel` is unused.

    Differs from the paper: the moments are those of the w window queries as they are, after RoPE and at their own
    positions, so Sigma has rank below w; the paper takes the hidden states of the whole prompt and rotates the
    moments to the mean of the next 512 positions (expected_attention_full). Votes; the softmax is over the span,
    without the context (one constant per q head, which matters only for the mean over the group). No epsilon beside
    the norm.
    """
    return log_expected(window, 0)


def log_expected(window: Window, first: int) -> torch.Tensor:
    """[H, n - first]: the score of the tokens from `first` on, the softmax over these alone."""
    w, group = window.position.shape[0], window.group

    def expected(block: slice) -> torch.Tensor:  # [H, b, G]
        logits = window.logits(block).unflatten(2, (w, group))
        spread = logits.var(dim=2, correction=0).mul_(0.5)
        return spread.add_(logits.mean(dim=2)).add_(window.lv[:, block, None])

    log_mass = torch.cat([expected(block) for block in window.blocks()], dim=1)[:, first:]
    log_share = torch.log_softmax(log_mass, dim=1)
    return torch.logsumexp(log_share, dim=2) - math.log(group) + window.v[:, first:].norm(dim=2).log()
