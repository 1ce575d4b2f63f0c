"""nearest_kept of any implementation against cosines in float64."""

from __future__ import annotations

import torch

TOLERANCE = 1e-5  # float32 sums of at most 256 products of size 1


def check_nearest(nearest_kept, gen, n, m, dim, device="cpu"):
    """Asserts the similarity and an allowed column that is as good; returns (arguments, similarity, column)."""
    heads = 2
    k = torch.randn(heads, n, dim, generator=gen)
    order = torch.stack([torch.randperm(n, generator=gen) for _ in range(heads)])
    kept, dropped = order[:, :m].sort(dim=1).values, order[:, m:].sort(dim=1).values
    allowed = torch.rand(heads, m, generator=gen) < 0.7
    allowed[:, 0] = True
    exact = torch.nn.functional.normalize(k.double(), dim=2)
    cosine = torch.stack([exact[h, dropped[h]] @ exact[h, kept[h]].T for h in range(heads)])
    wanted = cosine.masked_fill(~allowed[:, None, :], -torch.inf).max(dim=2)
    arguments = [x.to(device) for x in (k, dropped, kept, allowed)]
    best, column = (x.cpu() for x in nearest_kept(*arguments))
    assert (best - wanted.values).abs().max() < TOLERANCE
    got = cosine.gather(2, column[:, :, None])[:, :, 0]  # the same column, or one as good within rounding
    assert (got - wanted.values).abs().max() < TOLERANCE and allowed.gather(1, column).all()
    return arguments, best, column
