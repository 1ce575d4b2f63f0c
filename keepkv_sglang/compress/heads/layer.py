"""The heads of a layer share its cells: those with many tokens that they want keep more."""

from __future__ import annotations

import torch

from .base import Demand, largest


def layer(demand: Demand) -> torch.Tensor:
    """counts [L, H]: every layer keeps H * mean tokens, the largest shares of all its heads (Ada-KV, arXiv 2407.11550,
    with shares of the head instead of attention)."""
    return largest(demand.shares, demand.mean, demand.least)


layer.by_layer = True  # type: ignore[attr-defined]
