"""Batched segment operations over clusters of KV slots: tensors in, tensors out, no loop over heads or
clusters.

A *cluster* is one kept token and what joins it. Clusters of all heads are numbered flat, `head * m +
cluster`, and their members are listed sorted by that number, so that a sum over clusters is one
`embedding_bag` call: on CPU it is 3 to 4 times faster than index_add_, and on a GPU it adds in a fixed
order, where index_add_ is not deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Segments:
    """The members of all clusters of H heads, sorted by flat cluster number and, inside a cluster, by token
    index.

    rows    [T] int64: flat token row `head * n + token` of each member
    cluster [T] int64: flat cluster number `head * m + c` of each member, ascending
    bounds  [H * m + 1] int64: first member of each cluster, and where the last one ends
    counts  [H * m] int64: members per cluster, at least 1 in a valid assignment

    On a GPU T is the number of tokens: to cut it down to the members the host would have to wait for their number. What
    lies behind the last bound belongs to no cluster, and nothing adds it up.
    """

    rows: torch.Tensor
    cluster: torch.Tensor
    bounds: torch.Tensor
    counts: torch.Tensor
    heads: int
    m: int

    @property
    def offsets(self) -> torch.Tensor:
        """[H * m] int64: first member of each cluster."""
        return self.bounds[:-1]

    @staticmethod
    def from_assignment(assign: torch.Tensor, m: int) -> Segments:
        """assign: [H, n] int64, cluster number 0..m-1 per token, -1 for a dropped token."""
        heads = assign.shape[0]
        base = torch.arange(heads, device=assign.device)[:, None] * m
        flat = torch.where(assign >= 0, assign + base, heads * m).flatten()
        counts = _counts(flat, heads * m + 1)[:-1]
        ordered, rows = torch.sort(flat, stable=True)
        bounds = _bounds(counts)
        if known_to_host(assign):
            members = int(bounds[-1])
            ordered, rows = ordered[:members], rows[:members]
        return Segments(rows, ordered, bounds, counts, heads, m)

    @staticmethod
    def sorted(cluster: torch.Tensor, rows: torch.Tensor, heads: int, m: int) -> Segments:
        """From members in order: cluster [T] flat cluster numbers, ascending, and rows [T]."""
        counts = _counts(cluster, heads * m)
        return Segments(rows, cluster, _bounds(counts), counts, heads, m)

    def slots(self, part: torch.Tensor) -> Segments:
        """Clusters `part` [P] int64, ascending, of every head, numbered from 0."""
        number = part.new_full((self.m,), -1)
        number[part] = torch.arange(len(part), device=part.device)
        inside = self.cluster < self.heads * self.m
        number = number[self.cluster % self.m]
        inside &= number >= 0
        cluster = torch.div(self.cluster, self.m, rounding_mode="floor") * len(part) + number
        return Segments.sorted(cluster[inside], self.rows[inside], self.heads, len(part))

    def spread(self, per_cluster: torch.Tensor) -> torch.Tensor:
        """[H * m, F] -> [T, F], each member its cluster's row; anything behind the last member."""
        return per_cluster.index_select(0, self.cluster.clamp(max=self.heads * self.m - 1))


def known_to_host(x: torch.Tensor) -> bool:
    """Whether a number in x can be read without waiting for a GPU."""
    return x.is_cpu


def _counts(numbers: torch.Tensor, length: int) -> torch.Tensor:
    """How often each of 0..length-1 occurs; torch.bincount would wait for the GPU."""
    return numbers.new_zeros(length).scatter_add_(0, numbers, torch.ones_like(numbers))


def _bounds(counts: torch.Tensor) -> torch.Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


def segment_sum(
    table: torch.Tensor, seg: Segments, weights: torch.Tensor | None = None, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of (weighted) table rows per cluster.

    table [R, F] float; index [T] rows of the table, member by member (default: the table has one row per
    member);
    weights [T] of the table's dtype. Returns [H * m, F]; an empty cluster gives 0.
    """
    if index is None:
        index = torch.arange(table.shape[0], device=table.device)
    # One bag more, of what lies behind the members: CUDA's last bag goes to the end, whatever include_last_offset says.
    return F.embedding_bag(index, table, seg.bounds, mode="sum", per_sample_weights=weights)[:-1]


def segment_max(x: torch.Tensor, seg: Segments) -> torch.Tensor:
    """Maximum per cluster of x [T, F] (one row per member) -> [H * m, F]; an empty cluster gives the dtype's
    lowest."""
    lowest = torch.finfo(x.dtype).min
    out = x.new_full((seg.heads * seg.m + 1, x.shape[1]), lowest)  # the last row: what is in no cluster
    return out.scatter_reduce_(0, seg.cluster[:, None].expand_as(x), x, "amax")[:-1]


def segment_logsumexp(x: torch.Tensor, seg: Segments) -> torch.Tensor:
    """log sum exp per cluster of x [T, F] -> [H * m, F]. Each cluster is shifted by its own maximum: no
    overflow, and no cluster vanishes because another one is far stronger. An empty cluster gives -inf."""
    top = segment_max(x, seg)
    total = segment_sum(x.sub(seg.spread(top)).exp_(), seg)
    return total.log_().add_(top)


def segment_softmax(x: torch.Tensor, seg: Segments) -> torch.Tensor:
    """Softmax of x [T] inside each cluster -> [T], the weights of one cluster summing to 1."""
    return (x - seg.spread(segment_logsumexp(x[:, None], seg))[:, 0]).exp_()


def merge_segments(
    k: torch.Tensor, v: torch.Tensor, lv: torch.Tensor, log_w: torch.Tensor, seg: Segments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted means and summed votes of all clusters: k [H, m, D], v [H, m, Dv], lv [H, m].

    k [H, n, D], v [H, n, Dv], lv [H, n] log votes of one float dtype; log_w [T] of it, one per member. With w =
    exp(log_w): sum w k / sum w, sum w v / sum w, log sum p. An empty cluster gives 0, 0, -inf; one whose weights are
    all 0 NaN, NaN.
    """
    weights = segment_softmax(log_w, seg)
    means = [segment_sum(x.flatten(0, 1), seg, weights, seg.rows).view(seg.heads, seg.m, -1) for x in (k, v)]
    votes = segment_logsumexp(lv.flatten()[seg.rows][:, None], seg).view(seg.heads, seg.m)
    return means[0], means[1], votes


def nearest_kept(
    k: torch.Tensor,
    dropped: torch.Tensor,
    kept: torch.Tensor,
    allowed: torch.Tensor,
    within: int = 0,
    scratch_bytes: int = 64 << 20,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each dropped token the kept token whose key has the highest cosine similarity.

    k [H, n, D] float; dropped [H, r] and kept [H, u] int64 token indices; allowed [H, u] bool, False where a
    kept token may absorb nothing. within > 0: only among tokens of the same block [b * within, (b + 1) * within), so
    that time grows with n; dropped and kept then ascend. Returns (similarity [H, r], column [H, r] int64 into `kept`);
    similarity is -inf where nothing is allowed. A zero key has similarity 0 to everything. Equal
    similarities: the lower column. Similarities are held for one block of dropped tokens at a time: at most
    `scratch_bytes` (at least one token).
    """
    heads, n, dim = k.shape
    r, u = dropped.shape[1], kept.shape[1]
    best = k.new_full((heads, r), -torch.inf)
    column = torch.zeros_like(dropped)
    if u == 0 or r == 0:
        return best, column
    if 0 < within < n:
        at = torch.arange(0, n + within, within, device=k.device).expand(heads, -1).contiguous()
        ends = torch.stack([torch.searchsorted(x.contiguous(), at) for x in (dropped, kept)])
        # Of all heads together: what is another block's is masked.
        first, last = ends.amin(dim=1).tolist(), ends.amax(dim=1).tolist()
        for b in range(len(first[0]) - 1):
            part, columns = (slice(first[i][b], last[i][b + 1]) for i in range(2))
            ours, targets = dropped[:, part] // within == b, kept[:, columns]
            inside = allowed[:, columns] & (targets // within == b)
            top, found = nearest_kept(k, dropped[:, part], targets, inside, 0, scratch_bytes)
            best[:, part] = torch.where(ours, top, best[:, part])
            column[:, part] = torch.where(ours, found + columns.start, column[:, part])
        return best, column.clamp(max=u - 1)
    targets = F.normalize(k.gather(1, kept[:, :, None].expand(-1, -1, dim)), dim=2).transpose(1, 2)
    block = max(1, scratch_bytes // (heads * (u + dim) * k.element_size()))
    for start in range(0, r, block):
        tokens = dropped[:, start : start + block]
        rows = k.gather(1, tokens[:, :, None].expand(-1, -1, dim))
        sim = torch.bmm(rows, targets).masked_fill_(~allowed[:, None, :], -torch.inf)
        # Dividing by |k_i| does not move the maximum.
        top, column[:, start : start + block] = sim.max(dim=2)
        best[:, start : start + block] = top / rows.norm(dim=2).clamp(min=1e-12)
    return best, column


def gather_slots(pool: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Copies slots of a paged pool head by head: out[h, i] = pool[slots[i], h], bit for bit.

    pool [S, H, D], or [S, H]; slots [n] integers; out [H, n, D], or [H, n], of the pool's dtype.
    """
    out.copy_(pool.index_select(0, slots).transpose(0, 1))
