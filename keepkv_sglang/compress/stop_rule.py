"""How far a prompt can be compressed before attention notices: DBudgetKV's stop rule, offline.

DBudgetKV (arXiv 2502.16886; later versions: ReFreeKV) drops tokens until the Frobenius norm of the attention matrix
without them has shrunk by more than 1 % of the full one, instead of down to a budget that is fixed beforehand.

A tool for choosing a budget, NOT part of the server, on purpose: there m must be the same on every tensor-parallel
rank, and each rank sees the attention of its own heads only. Whoever wires it in must let the ranks agree first: sum
the two norms that `attention_lost` compares over all ranks, before comparing them.

Differs from the paper: m is the same in every layer, so the layer that loses most decides; tokens are ranked by the
policy's scorer, not by position; budgets are taken from a ladder; the matrix holds the window's queries (the paper's
release: the last one); what is merged counts as lost, though a merged slot still attracts attention for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from keepkv_sglang.compress.layer import LayerInput, head_views
from keepkv_sglang.compress.scorers import get_scorer
from keepkv_sglang.compress.select import SpanPolicy, check_ranges, select
from keepkv_sglang.compress.sums import query_sums

THRESHOLD = 0.01
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


def smallest_m(
    layers: Sequence[LayerInput],
    policy: SpanPolicy,
    ladder: Iterable[float] = LADDER,
    threshold: float = THRESHOLD,
    floor: int = 1,
) -> int:
    """Slots for a span of n tokens: the last step down the ladder before one whose loss exceeds the threshold.

    layers: the same span in every layer, n tokens each; mutated: nothing. policy: as compress_layer would get it; its m
    is ignored, its whole tokens come on top of every step. ladder: fractions of the tokens that are not whole. floor:
    fewer slots than this, whole tokens included, are never tried, nor fewer than shares and sinks need. Returns n when
    the first step already loses too much, or nothing was tried: then the span is not compressed. ValueError: no layers,
    layers of different length, no queries, a negative threshold, or ranges that the span cannot have.
    """
    lengths = {x.k.shape[0] for x in layers}
    if len(lengths) != 1:
        raise ValueError(f"one span has one length in all layers, not {sorted(lengths)}")
    if any(x.q.shape[0] == 0 for x in layers) or threshold < 0:
        raise ValueError("the stop rule compares attention: it needs window queries, and a threshold from 0 up")
    (n,) = lengths
    owed = sum(least for _, _, least in policy.shares) + policy.sinks if policy.shares else 1
    floor, best = max(floor, policy.whole_tokens + owed), n
    free = n - policy.whole_tokens
    steps = {policy.whole_tokens + math.ceil(b * free - 1e-9) for b in ladder}
    for m in sorted(steps, reverse=True):
        if m >= best:
            continue  # a step that keeps everything
        if m < floor or max(attention_lost(x, replace(policy, m=m)) for x in layers) > threshold:
            break
        best = m
    return best


def attention_lost(x: LayerInput, p: SpanPolicy) -> float:
    """1 - mean_h ||A_h restricted to the p.m kept tokens||_F / mean_h ||A_h||_F of one layer, in [0, 1].

    A_h [w, n]: causal attention, with votes, of the window's queries of q head h over the span's tokens; the context is
    in its denominator only. 0 when the span receives no attention at all.
    """
    check_ranges(p, x.k.shape[0])
    full = kept_part = 0.0
    for view in head_views(x):
        window = view.window(query_sums(view.q, *view.stored, False, view.host))
        kept, _ = select(get_scorer(p.scorer)(window, p.pool_kernel), p)
        heads, n = view.k.shape[:2]
        whole = slice(0, n)
        attention = window.attention(whole).masked_fill(window.hidden(whole), 0.0)  # [H, n, w * G], window-major
        squares = attention.square().view(heads, n, -1, window.group).sum(dim=2)  # [H, n, G]
        full += float(squares.sum(dim=1).sqrt().sum())
        index = kept[:, :, None].expand(-1, -1, window.group)
        kept_part += float(squares.gather(1, index).sum(dim=1).sqrt().sum())
    if not math.isfinite(full):
        raise ValueError("attention is not finite: the keys or queries are not")
    return max(0.0, 1.0 - kept_part / full) if full > 0 else 0.0
