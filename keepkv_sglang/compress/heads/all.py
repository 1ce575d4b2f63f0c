"""All layers and heads share their cells."""

from __future__ import annotations

import torch

from .base import Demand, largest


def all(demand: Demand) -> torch.Tensor:
    """counts [L, H]: the L H mean largest shares of all layers and heads."""
    layers, heads, n = demand.shares.shape
    return largest(demand.shares.reshape(1, layers * heads, n), demand.mean, demand.least).view(layers, heads)
