"""nearest_kept of any implementation against cosines in float64."""

from __future__ import annotations

import pytest
import torch

TOLERANCE = 1e-5  # float32 sums of at most 256 products of size 1


def check_nearest(nearest_kept, gen, n, m, dim, device="cpu", within=0, dtype=torch.float32):
    """Asserts the similarity and an allowed column that is as good; returns (arguments, similarity, column)."""
    heads = 2
    k = torch.randn(heads, n, dim, generator=gen).to(dtype)
    order = torch.stack([torch.randperm(n, generator=gen) for _ in range(heads)])
    kept, dropped = order[:, :m].sort(dim=1).values, order[:, m:].sort(dim=1).values
    allowed = torch.rand(heads, m, generator=gen) < 0.7
    allowed[:, 0] = True
    exact = torch.nn.functional.normalize(k.double(), dim=2)
    cosine = torch.stack([exact[h, dropped[h]] @ exact[h, kept[h]].T for h in range(heads)])
    inside = allowed[:, None, :] & (dropped[:, :, None] // (within or n) == kept[:, None, :] // (within or n))
    wanted = cosine.masked_fill(~inside, -torch.inf).max(dim=2)
    arguments = [x.to(device) for x in (k, dropped, kept, allowed)]
    best, column = (x.cpu() for x in nearest_kept(*arguments, within))
    none = wanted.values == -torch.inf
    assert best[none].eq(-torch.inf).all() and best.dtype == torch.float32
    assert (best - wanted.values)[~none].abs().max() < TOLERANCE
    # the same column, or one as good within rounding
    got = cosine.masked_fill(~inside, -torch.inf).gather(2, column[:, :, None])[:, :, 0]
    assert (got - wanted.values)[~none].abs().max() < TOLERANCE
    return arguments, best, column


def check_nearest_edges(nearest_kept, k):
    """Random keys k [1, 80, 64]. Ties take the lower column, also across panels and tiles; nothing allowed: -inf and 0;
    a zero key: similarity 0; a key that is not finite is nobody's nearest."""
    k[0, 2] = k[0, 50] = k[0, 70] = k[0, 79]
    k[0, 78] = 0.0
    kept, dropped = torch.arange(75, device=k.device)[None], torch.tensor([[79, 78]], device=k.device)
    allowed = torch.ones(1, 75, dtype=torch.bool, device=k.device)
    best, column = nearest_kept(k, dropped, kept, allowed)
    assert column[0].tolist() == [2, 0] and abs(best[0, 0] - 1) < 1e-6 and best[0, 1] == 0
    allowed[0, 2] = False
    assert nearest_kept(k, dropped, kept, allowed)[1][0, 0] == 50
    best, column = nearest_kept(k, dropped, kept, torch.zeros_like(allowed))
    assert best.eq(-torch.inf).all() and column.eq(0).all()
    none = nearest_kept(k, dropped, kept[:, :0], allowed[:, :0])
    assert none[0].eq(-torch.inf).all() and none[1].eq(0).all()
    for bad in (torch.nan, torch.inf):
        broken = k.clone()
        broken[0, 51, 3] = bad
        assert nearest_kept(broken, dropped, kept, allowed)[1][0, 0] == 50
    with pytest.raises(ValueError, match="float32"):
        nearest_kept(k.double(), dropped, kept, allowed)
