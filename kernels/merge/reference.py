"""Compression of one layer, equation by equation: loops over heads and clusters, any float dtype. The oracle.

Equations: KeepKV (arXiv 2504.09936) Eq. 6 to 8, SnapKV (arXiv 2404.14469) for pooled window scores; the
rules `tangent`, `least_squares` and `value_refit` are this project's, `attention_matching` is after arXiv 2602.16284.
`x` has the fields of
keepkv_sglang.compress.layer.LayerInput and `p` those of SpanPolicy; nothing is imported from there, so that
the two implementations share no code.

Notation for one kv head: l[i, q] = scale * q.k_i for the Q = w * G window queries of all q heads that share
it, p_i = exp(lv_i) the votes, Z_q = sum_{i seen by q} p_i exp(l[i, q]) over context and span, s_hat_i =
mean_q exp(l[i, q]) / Z_q.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from keepkv_sglang.kernels.head import RECENCY_HALF_LIFE, Head, head_of
from keepkv_sglang.kernels.score import reference as scorers

EMA_DECAY = 0.9
ZIP_MIN_DENOMINATOR = 1e-3
ZIP_KEY_SCALE = (0.5, 2.0)
RIDGE = 0.3
MAX_LOG_VOTE_CORRECTION = 4.0
REFIT_RIDGE = 3.0
REFIT_MIN_RIDGE = 0.01
MATCHING_STEPS = 5
MATCHING_WINDOW_WEIGHT = 256.0
MATCHING_RIDGE = 0.03
MATCHING_MIN_RIDGE = 1e-3
MATCHING_MAX_LOG_MASS = 20.0


def solve(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """system^-1 right, system symmetric and positive. By Cholesky: MKL's LU gives wrong numbers, or never ends, where
    the process has other threads that computed and torch.set_num_threads was called (seen with torch 2.14.1)."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))


def snapkv_score(x: Any, pool_kernel: int, dtype: torch.dtype = torch.float64, power: int = 1) -> torch.Tensor:
    """[Hkv, n]: mean of p_i exp(l) / Z over the queries that see token i, then over the tokens around it.

    power 2 (scorer `rms`): root of the mean square instead of the mean over queries (arXiv 2602.16284).
    """
    n, heads = x.k.shape[:2]
    out = torch.zeros(heads, n, dtype=dtype, device=x.k.device)
    for h in range(heads):
        a = head_of(x, h, dtype)
        raw = torch.zeros(n, dtype=dtype, device=x.k.device)
        for i in range(n):
            if a.seen[i].any():
                raw[i] = (a.lv[i] + a.logits[i] - a.log_z)[a.seen[i]].exp().pow(power).mean() ** (1 / power)
        for i in range(n):
            out[h, i] = raw[max(0, i - pool_kernel // 2) : i + pool_kernel // 2 + 1].mean()
    return out


def keepkv_score(x: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[Hkv, n]: log(p_i s_hat_i), s_hat by Eq. 8 over the queries that see token i; -inf when none does."""
    n, heads = x.k.shape[:2]
    out = torch.full((heads, n), -math.inf, dtype=dtype, device=x.k.device)
    for h in range(heads):
        a = head_of(x, h, dtype)
        for i in range(n):
            if a.seen[i].any():
                out[h, i] = a.lv[i] + _log_ema(a.logits[i][a.seen[i]], a.age[a.seen[i]])
    return out


def _log_ema(logits: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
    """log of sum_j decay^age_j exp(l_j) / sum_j decay^age_j (Eq. 8 with bias correction)."""
    log_weight = age.to(logits.dtype) * math.log(EMA_DECAY)
    return torch.logsumexp(logits + log_weight, 0) - torch.logsumexp(log_weight, 0)


# Selection and matching


def select(scores: torch.Tensor, p: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [Hkv, n] -> kept [Hkv, m], whole tokens first, then the others; absorbs [Hkv, m] bool."""
    heads, n = scores.shape
    whole = [i for start, end in p.whole for i in range(start, end)]
    free = [i for i in range(n) if i not in whole]
    m = p.m - len(whole)
    scores = scores.clone()
    scores[:, whole] = -math.inf
    by_chunk = chunk_scores(scores, p.chunk)
    recent = min(p.recent, max(p.carried, m // 2))
    sinks = min(p.sinks, m - recent)
    first, last = free[:sinks], free[len(free) - recent :]
    strong_count = math.ceil(round(p.strong_fraction * m, 9))
    kept, absorbs = [], []
    for h in range(heads):
        score = scores[h].tolist()
        order = [math.inf if i in first or i in last else by_chunk[h, i].item() for i in range(n)]
        ranked = [i for _, i in sorted((-order[i], i) for i in free)]
        owed = [i for a, b, least in p.shares for i in [i for i in ranked if a <= i < b][:least]]
        mine = [i for i in ranked if i in first or i in owed]
        mine += [i for i in ranked if i not in mine]
        mine = sorted(mine[:m])
        strong = [i for _, i in sorted((-score[i], i) for i in mine)][:strong_count]
        kept.append([*whole, *mine])
        absorbs.append([False] * len(whole) + [i not in first and i not in last and i not in strong for i in mine])
    return torch.tensor(kept, device=scores.device), torch.tensor(absorbs, device=scores.device)


def chunk_scores(scores: torch.Tensor, chunk: int) -> torch.Tensor:
    """[Hkv, n]: the mean over each token's chunk of what some query sees (ChunkKV, arXiv 2502.00299)."""
    out = scores.clone()
    for row in out:
        for start in range(0, len(row), chunk):
            part = row[start : start + chunk]
            finite = part[part > -math.inf]
            row[start : start + chunk] = finite.mean() if len(finite) else -math.inf
    return out


def match(
    x: Any, kept: torch.Tensor, absorbs: torch.Tensor, p: Any, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """[Hkv, n] cluster of each token, -1 dropped. `evict` matches nothing."""
    n, heads = x.k.shape[:2]
    assign = torch.full((heads, n), -1, device=x.k.device)
    for h in range(heads):
        k = x.k[:, h].to(dtype)
        norm = k.norm(dim=1)
        for c, i in enumerate(kept[h].tolist()):
            assign[h, i] = c
        targets = [c for c in range(kept.shape[1]) if absorbs[h, c]]
        for i in range(n):
            if assign[h, i] >= 0 or p.merge == "evict" or not targets:
                continue
            others = kept[h, targets]
            cosine = (k[others] @ k[i] / (norm[others] * norm[i]).clamp(min=1e-30)).tolist()
            best = cosine.index(max(cosine))
            if cosine[best] > p.threshold:
                assign[h, i] = targets[best]
    return assign


# Merging


def merge_cluster(a: Head, members: torch.Tensor, rule: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """One cluster of two or more tokens -> key [D], value [D], log votes, accepted (False: zip's guard)."""
    k, v, lv, logits = a.k[members], a.v[members], a.lv[members], a.logits[members]
    log_votes = torch.logsumexp(lv, 0)
    if rule == "zip":  # Eq. 7 in closed form for the whole cluster, s_hat by Eq. 8 un-normalised
        log_s = torch.stack([_log_ema(row, a.age) for row in logits])
    else:
        log_s = torch.logsumexp(logits - a.log_z, 1) - math.log(logits.shape[1])
    log_w = lv + log_s
    w = torch.softmax(log_w, 0)
    k_bar, v_bar = w @ k, w @ v
    if rule in ("mean", "attention_matching"):
        return k_bar, v_bar, log_votes, True
    if rule == "zip":
        denominator = (w * log_s).sum()
        scale = (torch.logsumexp(log_w, 0) - log_votes) / denominator
        in_range = ZIP_KEY_SCALE[0] <= float(scale) <= ZIP_KEY_SCALE[1]
        return k_bar * scale, v_bar, log_votes, bool(denominator.abs() >= ZIP_MIN_DENOMINATOR) and in_range
    log_mass = torch.logsumexp(lv[:, None] + logits, 0)  # [Q]
    attention = torch.softmax(log_mass - a.log_z, 0)  # the cluster's attention mass per query, as weights
    if rule == "tangent":
        return k_bar, v_bar, (attention * (log_mass - a.q @ k_bar)).sum(), True
    assert rule in ("least_squares", "value_refit"), rule
    r = log_mass - log_votes - a.q @ k_bar
    gram = a.q @ a.q.T
    ridge = RIDGE * gram.diagonal().mean()
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    delta = a.q.T @ solve(system, r[:, None])[:, 0] if float(ridge) > 0 else torch.zeros_like(k_bar)
    left = (attention * (r - a.q @ delta)).sum()
    left = left.clamp(-MAX_LOG_VOTE_CORRECTION, MAX_LOG_VOTE_CORRECTION)
    return k_bar + delta, v_bar, log_votes + left, True


def merge_from_assignment(
    x: Any,
    kept: torch.Tensor,
    assign: torch.Tensor,
    rule: str,
    guard: bool = False,
    dtype: torch.dtype = torch.float64,
    fixed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merges with a recorded selection -> k, v [m, Hkv, D], lv [m, Hkv] in `dtype`, not rounded to storage.

    guard=False: `assign` is what came out of the guards, and is carried out as it is. guard=True: a cluster
    that a guard refuses keeps its kept token.
    """
    m, heads = kept.shape[1], kept.shape[0]
    k = torch.empty(m, heads, x.k.shape[2], dtype=dtype, device=x.k.device)
    v = torch.empty(m, heads, x.v.shape[2], dtype=dtype, device=x.k.device)
    lv = torch.empty(m, heads, dtype=dtype, device=x.k.device)
    for h in range(heads):
        a = head_of(x, h, dtype)
        for c, i in enumerate(kept[h].tolist()):
            k[c, h], v[c, h], lv[c, h] = a.k[i], a.v[i], a.lv[i]
            members = torch.nonzero(assign[h] == c)[:, 0]
            if len(members) > 1 and rule != "evict":
                k_r, v_r, lv_r, accepted = merge_cluster(a, members, rule)
                finite = all(bool(t.isfinite().all()) for t in (k_r, v_r, lv_r))
                if finite and (accepted or not guard):
                    k[c, h], v[c, h], lv[c, h] = k_r, v_r, lv_r
        if rule == "value_refit":
            v[:, h] = refit_values(a, assign[h], k[:, h], v[:, h], lv[:, h])
        if rule == "attention_matching":
            v[:, h], lv[:, h] = match_attention(a, assign[h], k[:, h], v[:, h], lv[:, h], fixed)
    return k, v, lv


def refit_values(a: Head, assign: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lv: torch.Tensor) -> torch.Tensor:
    """Values [m, D] of one head's slots k [m, D], v [m, D], lv [m]; those of merged slots are solved for."""
    before = torch.exp(a.lv[:, None] + a.logits - a.log_z).masked_fill(~a.seen, 0.0)  # [n, Q]
    members = [torch.nonzero(assign == c)[:, 0] for c in range(len(k))]
    seen = torch.stack([a.seen[mine[0]] for mine in members])  # [m, Q]
    logits = (lv[:, None] + k @ a.q.T).masked_fill(~seen, -math.inf)
    log_z = torch.logsumexp(torch.cat((a.log_z_ctx[None], logits)), 0)
    after = torch.exp(logits - log_z.clamp(min=torch.finfo(k.dtype).min))
    residual = before.T @ a.v - after.T @ v
    merged = [c for c, mine in enumerate(members) if len(mine) > 1]
    free = after[merged]
    gram = free.T @ free
    ridge = REFIT_RIDGE * gram.diagonal().mean() + REFIT_MIN_RIDGE
    out = v.clone()
    out[merged] += free @ solve(gram + ridge * torch.eye(len(gram), dtype=v.dtype), residual)
    return out


def match_attention(
    a: Head, assign: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lv: torch.Tensor, fixed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [m, D] and log votes [m] of one head's slots that start as k, v, lv (arXiv 2602.16284, adapted). The first
    `fixed` stay as they are."""
    before = torch.exp(a.lv[:, None] + a.logits - a.log_z).masked_fill(~a.seen, 0.0)  # [n, Q]
    outside, share = torch.exp(a.log_z_ctx - a.log_z), before.sum(0)
    seen = torch.stack([a.seen[torch.nonzero(assign == c)[0, 0]] for c in range(len(k))])  # [m, Q]
    e = torch.exp((k @ a.q.T - a.log_z).clamp(max=MATCHING_MAX_LOG_MASS)).masked_fill(~seen, 0.0)
    weight = torch.ones_like(a.log_z)
    if a.reference.any():
        weight = torch.where(
            a.reference, 1.0, MATCHING_WINDOW_WEIGHT * 0.5 ** (a.age.to(a.k.dtype) / RECENCY_HALF_LIFE)
        ).to(k.dtype)
        weight = weight / weight.mean()
    votes = lv.exp()
    for _ in range(MATCHING_STEPS):
        wanted = weight * share / (votes @ e).clamp(min=1e-30)
        for c in range(fixed, len(k)):
            if float(e[c] @ weight) > 1e-30:
                bound = votes.new_tensor([-MAX_LOG_VOTE_CORRECTION, MAX_LOG_VOTE_CORRECTION]).add(lv[c]).exp()
                votes[c] = (votes[c] * (e[c] @ wanted) / (e[c] @ weight)).clamp(bound[0], bound[1])
    after = votes[:, None] * e
    after = after / (outside + after.sum(0)).clamp(min=1e-30)
    residual = (before.T @ a.v - after.T @ v) * weight.sqrt()[:, None]
    free = after[fixed:] * weight.sqrt()
    gram = free @ free.T
    ridge = MATCHING_RIDGE * free.square().sum() / len(a.q) + MATCHING_MIN_RIDGE
    system = gram + ridge * torch.eye(len(gram), dtype=v.dtype, device=v.device)
    return torch.cat((v[:fixed], v[fixed:] + solve(system, free @ residual))), votes.log()


def compress(x: Any, p: Any, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """kept, assign (after guards), k, v, lv: the whole of keepkv_sglang.compress.layer.compress_layer."""
    if p.scorer in ("snapkv", "rms"):
        scores = snapkv_score(x, p.pool_kernel, dtype, power=2 if p.scorer == "rms" else 1)
    elif p.scorer == "keepkv":
        scores = keepkv_score(x, dtype)
    else:
        scores = scorers.score(x, p.scorer, dtype)
    kept, absorbs = select(scores, p)
    assign = match(x, kept, absorbs, p, dtype)
    fixed = sum(end - start for start, end in p.whole)
    merged = merge_from_assignment(x, kept, assign, p.merge, True, dtype, fixed)
    for h in range(kept.shape[0]) if p.merge == "zip" else ():
        a = head_of(x, h, dtype)
        for c, i in enumerate(kept[h].tolist()):
            members = torch.nonzero(assign[h] == c)[:, 0]
            if len(members) > 1 and not merge_cluster(a, members, "zip")[3]:
                assign[h, members] = -1
                assign[h, i] = c
    return kept, assign, *merged
