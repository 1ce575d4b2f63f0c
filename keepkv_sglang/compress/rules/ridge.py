"""The ridge regression of rules that refit values: bounded memory, and time that grows as the number of slots.

A [H, m, Q] is asked for some slots at a time: `rows(slots)` makes A[:, slots]. No matrix that is factorised has more
than LARGEST rows, whatever m and Q are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

LARGEST = 1024
"""Rows of a matrix to factorise. Up to it in slots or in queries the solution is exact."""
BLOCK = 256
"""Slots that are solved for together where both are more than LARGEST."""
HELD_BYTES = 128 << 20
"""Memory for [H, m, Q]. What needs more is made anew for every pass, PART slots at a time."""
PART = 512
"""Slots."""

Rows = Callable[[slice], torch.Tensor]
"""slots -> the rows of some [H, m, Q] that belong to them, [H, b, Q]."""


class Refit:
    """Of some heads at once: rows(slots) makes some [H, m, Q] of theirs, like [H, m, ...] gives its H, m and dtype.

    Where HELD_BYTES allow it, it is made once: then `parts` is all slots, and the last pass leaves A in its place. Else
    a pass makes it anew, part by part.
    """

    def __init__(self, rows: Rows, queries: int, like: torch.Tensor) -> None:
        heads, m = like.shape[:2]
        self.held = heads * m * queries * like.element_size() <= HELD_BYTES
        self.parts = blocks_of(m, m if self.held else PART)
        self.rows = _held(rows(self.parts[0])) if self.held else rows

    def solve(
        self,
        attention: Callable[[torch.Tensor, slice], torch.Tensor],
        free: Callable[[torch.Tensor, slice], torch.Tensor],
        v: torch.Tensor,
        output: torch.Tensor,
        root: torch.Tensor | None,
        ridge: float,
        least: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """delta [H, m, D] for the values and solved [H], as `solve` gives them for A = free(attention(rows)) and
        R_q = root_q x (output_q - sum_c attention_cq v_c).

        attention(x, slots): rows x [H, b, Q] become the queries' attention to these slots; free(a, slots): A of these,
        root_q x attention, 0 for slots that stay as they are. Both in place. output [H, Q, D], v [H, m, D], root [Q].
        """
        residual, power = output, output.new_zeros(len(output))
        for part in self.parts:
            a = attention(self.rows(part), part)
            residual = residual - a.transpose(1, 2) @ v[:, part]
            power += free(a, part).square().sum(dim=(1, 2))
        if root is not None:
            residual *= root[:, None]

        def anew(slots: slice) -> torch.Tensor:
            return free(attention(self.rows(slots), slots), slots)

        rows = self.rows if self.held else anew
        return solve(rows, v.shape[1], residual, power / output.shape[1], ridge, least)


def by_heads(
    fit: Callable[[slice], tuple[torch.Tensor, ...]], queries: int, like: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """fit(heads) for as many heads at once as HELD_BYTES hold [H, m, Q] of, at least one; results joined. like [H, m,
    ...]: heads, slots and dtype."""
    heads, m = like.shape[:2]
    at_once = max(1, HELD_BYTES // max(1, m * queries * like.element_size()))
    found = [fit(part) for part in blocks_of(heads, at_once)]
    return found[0] if len(found) == 1 else tuple(torch.cat(x) for x in zip(*found, strict=True))


def solve(
    rows: Rows, m: int, right: torch.Tensor, power: torch.Tensor, ridge: float, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """delta [H, m, D] near (A A^T + lambda I)^-1 A R = A (A^T A + lambda I)^-1 R, and solved [H] bool: all that was to
    be factorised could be, and delta is finite. R `right` [H, Q, D], which is overwritten; power [H] sum of A^2 / Q;
    lambda = ridge x power + least.

    Up to LARGEST slots, or queries, one Cholesky of [m, m], or of [Q, Q], the smaller: m Q min(m, Q) products. With
    more of both, blocks b of at most BLOCK slots one after the other, each for what those before it left:

    delta_b = (A_b A_b^T + lambda I)^-1 A_b R,  R <- R - A_b^T delta_b,

    one sweep of Gauss-Seidel, which lowers ||R||^2 + lambda ||delta||^2 with every block; m Q (BLOCK + 4 D) products.
    """
    shift = (ridge * power + least)[:, None]
    if min(m, right.shape[1]) > LARGEST:
        return _by_blocks(rows, m, right, shift)
    if m <= right.shape[1]:
        a = rows(slice(0, m))
        return solve_gram(_gram([a], shift), a @ right)
    parts = blocks_of(m, m if m * right.shape[1] * right.element_size() <= HELD_BYTES else PART)
    dual, solved = solve_gram(_gram((rows(part).transpose(1, 2) for part in parts), shift), right)
    delta = torch.cat([rows(part) @ dual for part in parts], dim=1)
    return delta, solved & _finite(delta)


def solve_gram(gram: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gram^-1 right, solved [H] bool: gram could be factorised and the result is finite). Reads the lower triangle."""
    factor, info = torch.linalg.cholesky_ex(gram)
    delta = torch.cholesky_solve(right, factor)
    return delta, (info == 0) & _finite(delta)


def blocks_of(m: int, size: int) -> list[slice]:
    """0..m-1 in slices of `size`."""
    return [slice(i, min(i + size, m)) for i in range(0, m, size)]


def _held(whole: torch.Tensor) -> Rows:
    return lambda slots: whole[:, slots]


def _by_blocks(rows: Rows, m: int, right: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    deltas, solved = [], torch.ones(len(right), dtype=torch.bool, device=right.device)
    for part in blocks_of(m, BLOCK):
        a = rows(part)
        delta, done = solve_gram(_gram([a], shift), a @ right)
        right.baddbmm_(a.transpose(1, 2), delta, alpha=-1)
        deltas.append(delta)
        solved &= done
    return torch.cat(deltas, dim=1), solved


def _gram(terms: Iterable[torch.Tensor], shift: torch.Tensor) -> torch.Tensor:
    """sum of a a^T [H, r, r] over terms a [H, r, c], shift [H, 1] on the diagonal: the lower triangle, in panels."""
    gram = shift.new_zeros(())
    for a in terms:
        r = a.shape[1]
        gram = gram if gram.dim() else a.new_zeros(len(a), r, r)
        for part in blocks_of(r, BLOCK):
            gram[:, part.start :, part] += a[:, part.start :] @ a[:, part].transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(shift)
    return gram


def _finite(x: torch.Tensor) -> torch.Tensor:
    """[H]: all of x [H, ...] is finite."""
    return x.isfinite().flatten(1).all(dim=1)
