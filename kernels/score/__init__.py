"""Selection scores: `reference` (loops, the oracle of every scorer).

`cpp_impl` (CPU) and `triton_impl` (GPU): `window_sums`, all that scoring and the fit ask of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_WEIGHTS = 2


class Sums(NamedTuple):
    """What window_sums finds. a_iq = p_i exp(q.k_i) / Z_q; all float32.

    log_z, log_z_ctx [H, Q]: log of the softmax denominator with votes, over the context and what the query may see of
    the span, and over the context alone (-inf without one). received [H, n]: sum over all queries of a_iq, whether the
    query sees token i or not; a GPU gives its logarithm, log_received, so that nobody must look whether the sum is 0 or
    inf. squares [R, H, n]: sum over the queries that see token i of weights_rq a_iq^2. output
    [H, Q, Dv] or None: sum over the tokens that query q sees of a_iq v_i.
    """

    log_z: torch.Tensor
    log_z_ctx: torch.Tensor
    received: torch.Tensor | None
    log_received: torch.Tensor | None
    squares: torch.Tensor
    output: torch.Tensor | None


def check_window(
    q: torch.Tensor,
    position: torch.Tensor,
    k_ctx: torch.Tensor,
    lv_ctx: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lv: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """ValueError for shapes and dtypes that no window_sums takes (which storage one reads: its supports())."""
    if any(x.dtype != torch.float32 for x in (q, lv_ctx, lv, weights)):
        raise ValueError("window_sums takes float32 queries, votes and weights")
    heads, queries, dim = q.shape
    tokens = k.shape[0]
    shapes = (k_ctx.shape[1:], k.shape[1:], lv.shape, v.shape[:2], position.shape, weights.shape[1:])
    if shapes != ((heads, dim), (heads, dim), (tokens, heads), (tokens, heads), (queries,), (queries,)):
        raise ValueError(f"shapes {shapes} do not belong together with q {tuple(q.shape)}")
    if len(weights) > MAX_WEIGHTS or lv_ctx.shape != k_ctx.shape[:2] or position.dtype != torch.int64:
        raise ValueError("at most two rows of weights, a vote per context entry, int64 positions")
