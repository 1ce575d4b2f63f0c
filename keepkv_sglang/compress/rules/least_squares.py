"""`least_squares`: moves the tangent's key so that the cluster's mass fits all window queries (ridge)."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.rules.base import Clusters, Merged, by_slots

RIDGE = 0.3
"""lambda as a fraction of the mean diagonal of Q Q^T."""
MAX_LOG_VOTE_CORRECTION = 4.0


@by_slots
def least_squares(c: Clusters) -> Merged:
    """From tangent's k_bar, with Q the scaled window queries [Q, D] and P = sum_{i in C} p_i:

    r_q = log sum_{i in C} p_i exp(l_qi) - log P - Q k_bar,
    k_r = k_bar + Q^T (Q Q^T + lambda I)^-1 r,  lambda = 0.3 x mean diagonal of Q Q^T,
    log p_r = log P + clamp(mean over Q of what remains of r, weighted by the cluster's mass, -4, 4).
    v_r = sum w v / sum w.

    One Cholesky per head serves all its clusters. The smaller of the two equal forms is solved:
    Q^T (Q Q^T + lambda I)^-1 = (Q^T Q + lambda I)^-1 Q^T. A head whose factorisation fails or gives
    non-finite keys falls back to `tangent`. Not in the KeepKV paper.
    """
    k_bar, v, log_votes = c.means(c.members(c.window.log_weight()))
    log_share, q = c.log_share(), c.window.q
    r = log_share + c.window.log_z[:, None, :] - log_votes[:, :, None] - k_bar @ q.transpose(1, 2)
    delta, solved = _ridge(q, r)
    delta = torch.where(solved[:, None, None], delta, 0.0)
    left = c.mean_over_queries(log_share, r - delta @ q.transpose(1, 2))
    clamped = left.clamp(-MAX_LOG_VOTE_CORRECTION, MAX_LOG_VOTE_CORRECTION)
    return Merged(k_bar + delta, v, log_votes + torch.where(solved[:, None], clamped, left))


def _ridge(q: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """delta [H, m, D] = Q^T (Q Q^T + lambda I)^-1 r for q [H, Q, D], r [H, m, Q]; solved [H] bool."""
    count, dim = q.shape[1:]
    power = q.square().sum(dim=(1, 2)) / count
    ridge = (RIDGE * power).clamp(min=torch.finfo(q.dtype).tiny)  # all-zero queries: delta = 0, not a failure
    dual = count > dim
    gram = q.transpose(1, 2) @ q if dual else q @ q.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    factor, info = torch.linalg.cholesky_ex(gram)
    if dual:
        delta = torch.cholesky_solve((r @ q).transpose(1, 2), factor).transpose(1, 2)
    else:
        delta = torch.cholesky_solve(r.transpose(1, 2), factor).transpose(1, 2) @ q
    return delta, (info == 0) & delta.isfinite().flatten(1).all(dim=1)
