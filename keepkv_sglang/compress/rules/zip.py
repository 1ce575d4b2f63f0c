"""`zip`: ZIP-Merging, Eq. 7 and Eq. 8 of the KeepKV paper (arXiv 2504.09936), with guards."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.rules.base import Clusters, Merged
from keepkv_sglang.kernels.merge.torch_impl import segment_logsumexp, segment_softmax, segment_sum

EMA_DECAY = 0.9
"""Eq. 8: bias-corrected EMA over the window. The paper does not state alpha; newest query 0.1, each older
one 0.9 of it."""
MIN_DENOMINATOR = 1e-3
"""|sum w ln s / sum w| below this: the key scale is noise. Logits are of order 1 to 10."""
KEY_SCALE = (0.5, 2.0)
"""Outside this range the rescaled key is nothing like its members: measured KL 1.6 to 6.7 without guards
(script not kept)."""


def zip(c: Clusters) -> Merged:
    """With w = p s_hat over the members of a cluster:

    v_r = sum w v / sum w,   p_r = sum p,
    k_r = (sum w k) * ln(sum w / sum p) / (sum w ln s_hat).

    Exact for one query and one q head: p_r exp(q.k_r * scale) = sum w (Theorem 3).
    s_hat = EMA over the window of the un-normalised exp(q.k * scale), in the log domain.

    Differs from the paper: Eq. 7 merges pairs one after the other; this is its closed form for a whole
    cluster (the same for two members, independent of order for more). s_hat is averaged over the q heads of
    a GQA group, which the paper does not discuss. A merge whose denominator is near 0 or whose key scale
    leaves [0.5, 2] is refused.
    """
    ema = c.window.log_ema(EMA_DECAY)
    log_s = c.members(c.window.per_token(lambda block: torch.logsumexp(c.window.logits(block).add_(ema), dim=2)))
    log_w = c.members(c.lv) + log_s
    k, v, log_votes = c.means(log_w)
    share = segment_softmax(log_w, c.seg)
    denominator = c.per_cluster(segment_sum((share * log_s)[:, None], c.seg)).squeeze(2)
    log_total = c.per_cluster(segment_logsumexp(log_w[:, None], c.seg)).squeeze(2)
    scale = (log_total - log_votes) / denominator
    accepted = (denominator.abs() >= MIN_DENOMINATOR) & (scale >= KEY_SCALE[0]) & (scale <= KEY_SCALE[1])
    return Merged(k * scale[..., None], v, log_votes, accepted)
