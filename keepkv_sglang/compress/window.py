"""What a scorer sees: one layer's window queries against a span, for some kv heads at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from keepkv_sglang.compress.sums import QuerySums, recency
from keepkv_sglang.compress.transfer import numbers


@dataclass(frozen=True)
class Window:
    """Window queries of H kv heads against the n tokens of a span. Q = w * G: all q heads of the kv head.

    w may be 0, when a span is compressed with no queries at hand: then q, position and the log_z are empty, and
    only k, v and lv say something.

    q        [H, Q, D]: queries times the softmax scale, window-major (row j * G + g)
    k, v, lv [H, n, D], [H, n, D], [H, n]: keys, values and log votes of the span
    position [w]: index in the span of each query's token; query j sees span tokens <= position[j]
    log_z    [H, Q]: log of the softmax denominator, with votes, over the context and what the query may
             see of the span; log_z_ctx [H, Q]: of the context alone
    block_tokens: tensors [H, tokens, Q] exist only for this many tokens at a time
    whole    [H, n, Q] or None: attention() of the whole span, when that is one block and was needed for log_z
    sums     what a kernel found about all queries (sums.py), or None: torch computes it when asked
    host     position as numbers, where the host knows them: then nothing here waits for a GPU to learn one
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    position: torch.Tensor
    log_z: torch.Tensor
    log_z_ctx: torch.Tensor
    block_tokens: int
    whole: torch.Tensor | None
    sums: QuerySums | None = None
    host: list[int] | None = None

    @property
    def places(self) -> list[int]:
        """position, as numbers."""
        return numbers(self.position) if self.host is None else self.host

    @property
    def first_hidden(self) -> int:
        """Every query sees all tokens before this one."""
        return min(self.places) + 1

    @property
    def group(self) -> int:
        """G, q heads per kv head."""
        return self.q.shape[1] // self.position.shape[0]

    def parts(self) -> tuple[Window | None, Window | None]:
        """(the references, which stand behind the span and come first; the window proper); None: none of these."""
        count = sum(place >= self.k.shape[1] for place in self.places)
        if count in (0, len(self.position)):
            return (self, None) if count else (None, self)
        return self._queries(slice(count)), self._queries(slice(count, None))

    def _queries(self, tokens: slice) -> Window:
        """The same with only these of the w query tokens."""
        start = (tokens.start or 0) * self.group
        rows = slice(start, None if tokens.stop is None else tokens.stop * self.group)
        return replace(
            self,
            q=self.q[:, rows],
            position=self.position[tokens],
            log_z=self.log_z[:, rows],
            log_z_ctx=self.log_z_ctx[:, rows],
            whole=None if self.whole is None else self.whole[..., rows],
            sums=None,
            host=None if self.host is None else self.host[tokens],
        )

    def blocks(self) -> list[slice]:
        """Token ranges that cover the span."""
        return _blocks(self.k.shape[1], self.block_tokens)

    def logits(self, block: slice) -> torch.Tensor:
        """[H, b, Q]: scaled q.k, without votes, without the causal mask."""
        return torch.bmm(self.k[:, block], self.q.transpose(1, 2))

    def attention(self, block: slice) -> torch.Tensor:
        """[H, b, Q]: p_i exp(l_qi) / Z_q (Eq. 6, normalised), Z_q causal, the numerator not. Read-only.

        A token that the query may not see can be anything up to inf, and one far below the query's strongest
        can be 0: take logarithms of sums of it only if they are `trusted`.
        """
        if self.whole is not None:
            return self.whole[:, block]
        if block == slice(0, self.k.shape[1]):
            return self._one_block
        return self._attention(block)

    @cached_property
    def _one_block(self) -> torch.Tensor:
        return self._attention(slice(0, self.k.shape[1]))

    def _attention(self, block: slice) -> torch.Tensor:
        return self.logits(block).add_(self.lv[:, block, None]).sub_(self.log_z[:, None, :]).exp_()

    def hidden(self, block: slice) -> torch.Tensor:
        """[b, Q] bool: the query may not see the token."""
        return _hidden(self.position, self.group, block)

    def per_token(self, function: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Joins function(block) [H, b] over the span's blocks: [H, n]."""
        parts = [function(block) for block in self.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def received(self) -> torch.Tensor:
        """[H, n]: softmax attention, with votes and causal, that each token receives from all Q queries."""
        return self._received(lambda attention: attention.sum(dim=2))

    def received_norm(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """[H, n]: as received(), the root of the sum of squares over the queries, weighted by weight [Q]."""
        if weight is None and self.sums is not None:
            return self.sums.squares().sqrt()
        if weight is None:
            return self._received(lambda attention: torch.linalg.vector_norm(attention, dim=2))
        root = weight.sqrt()
        return self._received(lambda attention: torch.linalg.vector_norm(attention * root, dim=2))

    def norms(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(received_norm() of the references, received_norm(recency()) of the window proper), each [H, n]; None where
        one of them has no queries."""
        references, proper = self.parts()
        if references is None or proper is None:
            return None
        if self.sums is not None and self.sums.references is not None and self.sums.recent is not None:
            return self.sums.references.sqrt(), self.sums.recent.sqrt()
        return references.received_norm(), proper.received_norm(proper.recency())

    def _received(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """reduce: [H, b, Q] -> [H, b], of attention that is 0 where the query may not see the token."""
        first_hidden = self.first_hidden

        def one_block(block: slice) -> torch.Tensor:
            attention, seen = self.attention(block), _seen_by_all(block, first_hidden)
            parts = [reduce(attention[:, :seen])]
            if seen < attention.shape[1]:
                hidden = self.hidden(slice(block.start + seen, block.stop))
                parts.append(reduce(attention[:, seen:].masked_fill(hidden, 0.0)))
            return torch.cat(parts, dim=1)

        return self.per_token(one_block)

    def mean_received(self) -> torch.Tensor:
        """[H, n]: received(), mean over the queries that see the token, so that late tokens are not at a
        disadvantage; 0 for a token that none sees."""
        return self.received() / self.viewers()

    def viewers(self) -> torch.Tensor:
        """[n], compute dtype: how many of the Q queries see each token, at least 1."""
        token = torch.arange(self.k.shape[1], device=self.k.device)
        earlier = torch.searchsorted(self.position.sort().values, token)
        return ((self.position.shape[0] - earlier) * self.group).clamp(min=1).to(self.k.dtype)

    def log_weight(self) -> torch.Tensor:
        """[H, n]: log w_i = log(p_i s_hat_i), s_hat_i = mean over the Q queries of exp(l_qi) / Z_q.

        Differs from the paper: softmax-normalised per query (so that exp cannot overflow; Eq. 8 takes the
        raw exp); and the numerator ignores the causal mask, so that the last tokens, which few window
        queries may see, do not weigh zero in a merge. Without queries s_hat_i = 1: w_i = p_i. Read-only.
        """
        return self._log_weight

    @cached_property
    def _log_weight(self) -> torch.Tensor:
        if self.q.shape[1] == 0:
            return self.lv
        if self.sums is not None and self.sums.log_received is not None:
            return self.sums.log_received - math.log(self.q.shape[1])
        if self.sums is not None and self.sums.received is not None:
            total = self.sums.received
        else:
            total = self.per_token(lambda block: self.attention(block).sum(dim=2))
        if trusted(total):
            total = total.log()
        else:
            shift = self.log_z[:, None, :]
            total = self.lv + self.per_token(lambda b: torch.logsumexp(self.logits(b).sub_(shift), dim=2))
        return total - math.log(self.q.shape[1])

    def recency(self) -> torch.Tensor:
        """[Q]: 2^(-age / 4), age in query tokens before the newest; the group's heads alike."""
        return recency(self.position.shape[0], self.group, self.q)

    def log_ema(self, decay: float) -> torch.Tensor:
        """[Q]: log weights, summing to 1, of Eq. 8: bias-corrected EMA over the window; the group's heads
        alike."""
        w = self.position.shape[0]
        age = torch.arange(w - 1, -1, -1, device=self.q.device, dtype=self.q.dtype)
        return torch.log_softmax((age * math.log(decay)).repeat_interleave(self.group), 0)


class Scorer(Protocol):
    """Higher scores are kept. A scorer is a function of the window and the pooling width alone.

    Those named in scorers.QUERY_AGNOSTIC read nothing but k, v and lv, and work with a window of no queries; a
    scorer from elsewhere says so with an attribute `needs_queries = False`.
    """

    def __call__(self, window: Window, pool_kernel: int) -> torch.Tensor:
        """Returns [H, n] scores in the window's dtype; -inf marks a token that no window query sees."""
        ...


def trusted(sums: torch.Tensor) -> bool:
    """True when sums of Window.attention neither overflowed nor lost precision to underflow, so that their
    logarithm is exact to rounding. False, and a slower exact path, where a whole sum is below e^-69 of the
    query's total (float32).
    """
    return bool(((sums > 1e8 * torch.finfo(sums.dtype).tiny) & (sums < torch.inf)).all())


def observe(
    q: torch.Tensor,
    position: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lv: torch.Tensor,
    log_z_ctx: torch.Tensor,
    block_tokens: int,
    host: list[int] | None = None,
) -> Window:
    """Builds the Window. q [H, Q, D] already scaled, position [w], k, v [H, n, D], lv [H, n], log_z_ctx
    [H, Q] (-inf without a context), host as Window has it. Q may be 0. Holds about two [H, block_tokens, Q] tensors at
    its peak."""
    n = k.shape[1]
    if q.shape[1] == 0:
        return Window(q, k, v, lv, position, log_z_ctx, log_z_ctx, n, None, None, host)
    group = q.shape[1] // position.shape[0]
    first_hidden = min(numbers(position) if host is None else host) + 1
    log_z, x = log_z_ctx, None
    for block in _blocks(n, block_tokens):
        x = torch.bmm(k[:, block], q.transpose(1, 2)).add_(lv[:, block, None])
        seen = _seen_by_all(block, first_hidden)
        if seen:
            log_z = torch.logaddexp(log_z, torch.logsumexp(x[:, :seen], dim=1))
        if seen < x.shape[1]:
            hidden = _hidden(position, group, slice(block.start + seen, block.stop))
            visible = x[:, seen:].masked_fill(hidden, -torch.inf)
            log_z = torch.logaddexp(log_z, torch.logsumexp(visible, dim=1))
    assert x is not None
    whole = x.sub_(log_z[:, None, :]).exp_() if x.shape[1] == n else None
    return Window(q, k, v, lv, position, log_z, log_z_ctx, block_tokens, whole, None, host)


def context_log_z(q: torch.Tensor, k_ctx: torch.Tensor, lv_ctx: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """log sum_i p_i exp(q.k_i) over a context, block by block.

    q [H, Q, D] scaled; k_ctx [c, H, D] and lv_ctx [c, H] as stored, converted one block at a time. Returns
    [H, Q], -inf for an empty context.
    """
    total = q.new_full(q.shape[:2], -torch.inf)
    for block in _blocks(k_ctx.shape[0], block_tokens):
        k, lv = k_ctx[block].to(q.dtype).permute(1, 2, 0), lv_ctx[block].to(q.dtype).T
        total = torch.logaddexp(total, torch.logsumexp(torch.bmm(q, k).add_(lv[:, None, :]), dim=2))
    return total


def _blocks(n: int, block_tokens: int) -> list[slice]:
    return [slice(i, min(i + block_tokens, n)) for i in range(0, n, block_tokens)]


def _seen_by_all(block: slice, first_hidden: int) -> int:
    """How many tokens at the block's start precede `first_hidden`."""
    return min(max(first_hidden, block.start), block.stop) - block.start


def _hidden(position: torch.Tensor, group: int, block: slice) -> torch.Tensor:
    token = torch.arange(block.start, block.stop, device=position.device)
    return (token[:, None] > position[None, :]).repeat_interleave(group, dim=1)
