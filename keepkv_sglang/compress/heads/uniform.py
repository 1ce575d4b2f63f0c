"""The same number of tokens in every head."""

from __future__ import annotations

import torch

from .base import Demand


def uniform(demand: Demand) -> torch.Tensor:
    """counts [L, H]: the mean."""
    layers, heads, _ = demand.shares.shape
    return torch.full((layers, heads), demand.mean, dtype=torch.int64, device=demand.shares.device)


uniform.by_layer = True  # type: ignore[attr-defined]
