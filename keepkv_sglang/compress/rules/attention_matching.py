"""`attention_matching`: votes that give the queries' attention mass back, values that give their outputs back."""

from __future__ import annotations

from types import ModuleType

import torch

from keepkv_sglang.compress.rules import ridge
from keepkv_sglang.compress.rules.base import Clusters, Merged
from keepkv_sglang.compress.window import Window
from keepkv_sglang.kernels import choose

VOTE_STEPS = 5
"""Multiplicative steps from the summed votes; few of them, as regularisation. 20 gain nothing."""
MAX_LOG_VOTE_CORRECTION = 4.0
WINDOW_WEIGHT = 256.0
"""Where there are references, the newest query of the window counts as many of them, older ones less (Window.recency):
what comes next looks where the prompt's end looks. Measured for KL and recall, docs/log.md."""
MAX_LOG_MASS = 20.0
"""A slot whose first token a query sees, but whose others it does not, may exceed the query's softmax denominator."""
RIDGE = 0.03
"""lambda as a multiple of the mean diagonal of A^T A. Measured: 0.01 and 0.03 alike with references, 0.3 worse."""
MIN_RIDGE = 1e-3
"""Added to lambda: slots that the queries hardly look at must not take on large values."""


def attention_matching(c: Clusters) -> Merged:
    """Keys as `mean`; votes and values of ALL slots, merged or not, are fitted to the queries Q of the window.

    k_c = weighted mean of the cluster's keys, e_cq = exp(q.k_c) / Z_q for a slot whose first member q sees, else 0;
    S_q = sum_{i seen by q} a_qi, the span's share of the query's attention (1 without a context).
    Slots that a client protects (Clusters.fixed) keep votes and values.
    g_q = 256 x 2^(-age / 4) for a query of the window, 1 for a reference, divided by their mean; without references 1.
    Votes: u_c = sum p; five times u_c <- u_c sum_q g_q e_cq S_q / M_q / sum_q g_q e_cq, M_q = sum_c u_c e_cq,
    which lowers the Kullback-Leibler distance of M from S at every step and keeps u positive;
    log u_c stays within 4 of log sum p.
    Values: with A_cq = sqrt(g_q) u_c e_cq / (Z_ctx,q / Z_q + M_q) and V the weighted means of the cluster's values,

    V_r = V + (A A^T + lambda I)^-1 A R,  R_q = sqrt(g_q) sum_{i seen by q} a_qi v_i - sum_c A_cq V_c,
    lambda = 0.03 x mean diagonal of A^T A + 0.001.

    What was dropped is thus spread over all slots. One Cholesky per head, of the smaller of [Q, Q] and [m, m], up to
    1,024 rows; where both are larger, blocks of slots one after the other (ridge.solve). A head whose factorisation
    fails or gives values that are not finite keeps V. Wants many queries that look at different things: with references
    (compress/queries/references.py), not with the last few queries alone.

    Measured (SmolLM2-135M, 1,536 tokens, 20 held-out documents, window_references, 256 references, docs/quality.md):
    KL to the full cache over that of SnapKV with eviction .60 at 10 % and .44 at 20 % kept, over that of the released
    KeepKV .69 and .49.

    After Attention Matching (arXiv 2602.16284): votes are its biases, refitted values its C_v. Differs from the paper:
    keys are means of clusters, where it keeps the keys of the selected tokens; votes by multiplicative steps from the
    summed votes, where it solves a nonnegative least squares problem; values by a ridge that pulls to the
    merged values, where it pulls to zero or nowhere; reference queries are those of the prompt, moved.
    """
    k, v, start = c.means(c.members(c.window.log_weight()))
    first = c.seg.rows[c.seg.offsets].view(c.assign.shape[0], -1) % c.assign.shape[1]
    usable = k.isfinite().all(dim=2) & v.isfinite().all(dim=2)
    k, v = (x.masked_fill(~usable[..., None], 0.0) for x in (k, v))
    kernel = choose.implementation("merge", k) if c.window.sums is not None else None
    if kernel is not None and hasattr(kernel, "fit") and k.shape[1] <= min(c.window.q.shape[1], ridge.LARGEST):
        votes, delta, solved = _fit_in_one_pass(kernel, c, k, v, start, first, usable)
    else:
        votes, delta, solved = _fit(c, k, v, start, first, usable)
    v = v + torch.where(solved[:, None, None], delta, 0.0)
    return Merged(k, v, votes.masked_fill(~usable, torch.nan), rewrites_all=True)


attention_matching.reads_outputs = True  # type: ignore[attr-defined]


Fitted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""log votes [H, m], delta [H, m, D] to add to the values, solved [H] bool."""


def _fit(
    c: Clusters, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, first: torch.Tensor, usable: torch.Tensor
) -> Fitted:
    """k, v [H, m, D]: means of the clusters; start [H, m]: log of their summed votes; first [H, m]: their first tokens;
    usable [H, m]: the means are finite."""
    window, output, weight = c.window, c.outputs(), _weight(c.window)
    position = window.position.repeat_interleave(window.group)
    root = weight.sqrt()

    def fit(h: slice) -> Fitted:
        q, log_z, outside = window.q[h], window.log_z[h], (window.log_z_ctx[h] - window.log_z[h]).exp_()

        def masses(slots: slice) -> torch.Tensor:
            """e [H, b, Q]"""
            e = torch.bmm(k[h, slots], q.transpose(1, 2)).sub_(log_z[:, None, :]).clamp_(max=MAX_LOG_MASS).exp_()
            hidden = first[h, slots, None] > position
            return e.masked_fill_(hidden | ~usable[h, slots, None], 0.0)

        refit = ridge.Refit(masses, len(weight), v[h])
        votes, mass = _votes(refit, (1 - outside).clamp_(min=0.0), weight, start[h], c.fixed)
        total, u = (outside + mass).clamp(min=1e-30)[:, None], votes.exp()[..., None]

        def attention(e: torch.Tensor, slots: slice) -> torch.Tensor:
            return e.mul_(u[:, slots]).div_(total)

        def free(a: torch.Tensor, slots: slice) -> torch.Tensor:
            a.mul_(root)[:, : max(0, c.fixed - slots.start)] = 0.0
            return a

        return votes, *refit.solve(attention, free, v[h], output[h], root, RIDGE, MIN_RIDGE)

    votes, delta, solved = ridge.by_heads(fit, len(weight), v)
    return votes, delta, solved


def _fit_in_one_pass(
    kernel: ModuleType,
    c: Clusters,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    first: torch.Tensor,
    usable: torch.Tensor,
) -> Fitted:
    """The same on a CPU, where kernels/score and kernels/merge have their C++, for no more slots than queries
    and than ridge.LARGEST."""
    window = c.window
    found = kernel.fit(
        k,
        v,
        start,
        first.masked_fill(~usable, -1),
        window.q,
        window.position.repeat_interleave(window.group),
        window.log_z,
        window.log_z_ctx,
        c.outputs(),
        _weight(window),
        fixed=c.fixed,
        steps=VOTE_STEPS,
        max_correction=MAX_LOG_VOTE_CORRECTION,
        max_log_mass=MAX_LOG_MASS,
        ridge=RIDGE,
        min_ridge=MIN_RIDGE,
    )
    return found.votes, *ridge.solve_gram(found.gram, found.rhs)


def _weight(window: Window) -> torch.Tensor:
    """[Q], mean 1. References stand behind the span, the window's queries in it."""
    reference = (window.position >= window.k.shape[1]).repeat_interleave(window.group)
    weight = torch.where(reference, 1.0, WINDOW_WEIGHT * window.recency())
    weight = torch.where(reference.any(), weight, 1.0)
    return weight / weight.mean()


def _votes(
    e: ridge.Refit, share: torch.Tensor, weight: torch.Tensor, start: torch.Tensor, fixed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """e of all slots, share [H, Q], weight [Q], start [H, m] -> log votes [H, m] and the mass [H, Q] that
    they give. One pass over e a step, and one before."""
    tiny = 1e-30
    pieces, totals, mass = [start[:, part] for part in e.parts], [], torch.zeros_like(share)
    for part, lv in zip(e.parts, pieces, strict=True):
        x = e.rows(part)
        totals.append(x @ weight)
        mass = mass + (lv.exp()[:, None] @ x)[:, 0]
    for _ in range(VOTE_STEPS):
        wanted, mass = (weight * share / mass.clamp(min=tiny))[..., None], torch.zeros_like(share)
        for i, (part, total) in enumerate(zip(e.parts, totals, strict=True)):
            x, base = e.rows(part), start[:, part]
            factor = (x @ wanted)[..., 0] / total.clamp(min=tiny)
            change = torch.where(total > tiny, factor.clamp(min=tiny).log_(), 0.0)  # nobody looks: as it was
            change[:, : max(0, fixed - part.start)] = 0.0
            correction = (pieces[i] - base + change).clamp_(-MAX_LOG_VOTE_CORRECTION, MAX_LOG_VOTE_CORRECTION)
            pieces[i] = correction + base
            mass = mass + (pieces[i].exp()[:, None] @ x)[:, 0]
    return torch.cat(pieces, dim=1), mass
