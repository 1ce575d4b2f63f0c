"""What crosses between host and device, and who waits for it."""

from __future__ import annotations

import torch

from keepkv_sglang.kernels.host import on_device

__all__ = ["numbers", "on_device"]


def numbers(position: torch.Tensor) -> list[int]:
    """Waits for a GPU."""
    return [int(place) for place in position.tolist()]
