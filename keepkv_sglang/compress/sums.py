"""What a kernel (kernels/score: C++ on a CPU, Triton on a GPU) finds about a window, logits of all queries never held.

In torch it is one operation after the other over [H, n, Q].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from keepkv_sglang.compress.transfer import numbers
from keepkv_sglang.kernels import choose

RECENCY_HALF_LIFE = 4.0
"""Query tokens. 4 found more passwords than 8, and a window of 32 without decay fewer than the last query alone."""


def recency(w: int, group: int, like: torch.Tensor) -> torch.Tensor:
    """Window.recency() of a window of w tokens with `group` q heads, in the dtype and on the device of `like`."""
    age = torch.arange(w - 1, -1, -1, device=like.device, dtype=like.dtype)
    return torch.exp2(age / -RECENCY_HALF_LIFE).repeat_interleave(group)


class QuerySums(NamedTuple):
    """Of all queries of a Window, float32; a_iq as in Window.attention.

    log_z, log_z_ctx [H, Q]: as Window has them. received [H, n]: sum of a_iq over all queries, seen or not, and
    log_received [H, n] its logarithm: one of the two, as the kernel gives it. references,
    window, recent [H, n] or None (no such queries): sums of squares over the queries that see the token, over the
    references, over the window proper, and over that with its recency() as weights. output [H, Q, D] or None: the
    queries' attention outputs from the span.
    """

    log_z: torch.Tensor
    log_z_ctx: torch.Tensor
    received: torch.Tensor | None
    log_received: torch.Tensor | None
    references: torch.Tensor | None
    window: torch.Tensor | None
    recent: torch.Tensor | None
    output: torch.Tensor | None

    def squares(self) -> torch.Tensor:
        """[H, n], over all queries."""
        parts = [x for x in (self.references, self.window) if x is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class Stored(NamedTuple):
    """Some kv heads of one layer as they lie in the pool: position [w] int64 as Window has it, k_ctx [c, H, D] and
    lv_ctx [c, H] before the span, k, v [n, H, D] and lv [n, H] the span."""

    position: torch.Tensor
    k_ctx: torch.Tensor
    lv_ctx: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor


def query_sums(
    q: torch.Tensor,
    position: torch.Tensor,
    k_ctx: torch.Tensor,
    lv_ctx: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lv: torch.Tensor,
    outputs: bool,
    host: list[int] | None = None,
) -> QuerySums | None:
    """q [H, Q, D] and host as in Window; the others as in Stored. outputs: whether output is wanted. None where no
    kernel runs (choose.py), or with another dtype: torch computes it."""
    if q.shape[1] == 0 or any(x.dtype != torch.float32 for x in (q, lv_ctx, lv)):
        return None
    kernel = choose.implementation("score", k)
    if kernel is None or not kernel.supports(k_ctx, k, v):
        return None
    w, group = position.shape[0], q.shape[1] // position.shape[0]
    references = sum(place >= k.shape[0] for place in (numbers(position) if host is None else host))
    rows, border = position.repeat_interleave(group), references * group
    ones, newest = q.new_ones(1, q.shape[1]), recency(w - references, group, q)[None]
    behind = proper = None
    if references:
        at, weights = slice(0, border), ones[:, :border]
        behind = kernel.window_sums(q[:, at], rows[at], k_ctx, lv_ctx, k, v, lv, weights, outputs)
    if references < w:
        at, weights = slice(border, None), torch.cat([ones[:, border:], newest])
        proper = kernel.window_sums(q[:, at], rows[at], k_ctx, lv_ctx, k, v, lv, weights, outputs)
    parts = [x for x in (behind, proper) if x is not None]

    def joined(name: str) -> torch.Tensor:
        found = [getattr(x, name) for x in parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def added(found: list[torch.Tensor | None], add: Callable[..., torch.Tensor]) -> torch.Tensor | None:
        first, *rest = found
        return first if not rest or first is None else add(first, rest[0])

    return QuerySums(
        joined("log_z"),
        joined("log_z_ctx"),
        added([x.received for x in parts], torch.add),
        added([x.log_received for x in parts], torch.logaddexp),
        None if behind is None else behind.squares[0],
        None if proper is None else proper.squares[0],
        None if proper is None else proper.squares[1],
        joined("output") if outputs else None,
    )
