"""Compression of one layer: `reference` (the equations), `torch_impl` (batched segment operations).

`cpp_impl`: matching and the fit of attention_matching on a CPU. `triton_impl`: matching, merging, gather on a GPU.
"""

from __future__ import annotations

import torch

from keepkv_sglang.kernels import cpu_build
from keepkv_sglang.kernels.merge import torch_impl


def nearest_kept(
    k: torch.Tensor, dropped: torch.Tensor, kept: torch.Tensor, allowed: torch.Tensor, scratch_bytes: int = 64 << 20
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch_impl.nearest_kept by the fastest implementation that runs here."""
    cpp = cpu_build.implementation("merge") if k.is_cpu else None
    if cpp is not None and cpp.supports(k):
        return cpp.nearest_kept(k, dropped, kept, allowed)
    return torch_impl.nearest_kept(k, dropped, kept, allowed, scratch_bytes)
