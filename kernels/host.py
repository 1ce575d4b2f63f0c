"""Small tensors on their way from the host to a device."""

from __future__ import annotations

import torch


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device. To a GPU from pinned memory, so that nobody waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)
