"""`tangent`: weighted mean key, and votes that make the cluster's mass right at the window's queries."""

from __future__ import annotations

from keepkv_sglang.compress.rules.base import Clusters, Merged, by_slots


@by_slots
def tangent(c: Clusters) -> Merged:
    """k_r, v_r = means weighted by w = p s_hat;
    log p_r = mean over Q of [log sum_{i in C} p_i exp(l_qi) - q.k_r], weighted by the cluster's attention
    mass per query.

    log sum_i p_i exp(q.k_i) is convex in q and its gradient is the weighted mean key. With one query this is
    its tangent there: exact in value and slope, never above the true mass elsewhere; its error is half the
    q-variance of the keys. With several queries it is a compromise. Not in the KeepKV paper; log domain
    throughout.
    """
    k, v, _ = c.means(c.members(c.window.log_weight()))
    log_share = c.log_share()
    target = log_share + c.window.log_z[:, None, :] - k @ c.window.q.transpose(1, 2)
    return Merged(k, v, c.mean_over_queries(log_share, target))
