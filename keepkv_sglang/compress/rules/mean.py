"""`mean`: the weighted mean of the KeepKV authors' released script, with votes."""

from __future__ import annotations

from keepkv_sglang.compress.rules.base import Clusters, Merged


def mean(c: Clusters) -> Merged:
    """k_r = sum w k / sum w, v_r = sum w v / sum w, p_r = sum p, with w = p s_hat; w = p without queries.

    Differs from the paper: no ln rescale of the key (Eq. 7), no EMA (mean over the window), as in the
    released script. Differs from that script: s_hat from softmax-normalised attention, whose exp cannot
    overflow.
    """
    k, v, log_votes = c.means(c.members(c.window.log_weight()))
    return Merged(k, v, log_votes)
