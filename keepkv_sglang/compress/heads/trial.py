"""Two layers of two heads with eight tokens on which a policy of somebody else's is tried before it is used."""

from __future__ import annotations

import torch

from .base import Demand, Sharing


def try_sharing(sharing: Sharing) -> None:
    """Raises ValueError unless the policy gives [L, H] int64, the mean on average; passes on what it raises."""
    scores = torch.linspace(0, 3, 2 * 2 * 8).sin().abs().view(2, 2, 8)
    counts = sharing(Demand.of(scores, mean=4, least=1))
    if not isinstance(counts, torch.Tensor) or counts.shape != (2, 2) or counts.dtype != torch.int64:
        found = (tuple(counts.shape), counts.dtype) if isinstance(counts, torch.Tensor) else type(counts).__name__
        raise ValueError(f"it must return an int64 tensor [L, H] = (2, 2), not {found}")
    if int(counts.sum()) != 16 or int(counts.min()) < 1 or int(counts.max()) > 8:
        raise ValueError(f"it gave {counts.tolist()}: 16 tokens in all, at least 1 and at most 8 in each head")
