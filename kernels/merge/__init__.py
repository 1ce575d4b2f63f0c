"""Compression of one layer: `reference` (the equations), `torch_impl` (batched segment operations).

`cpp_impl`: matching, merging and the fit of attention_matching on a CPU. `triton_impl`: matching, merging and gather
on a GPU.
"""

from __future__ import annotations

import torch

from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.merge import torch_impl
from keepkv_sglang.kernels.merge.torch_impl import Segments


def nearest_kept(
    k: torch.Tensor,
    dropped: torch.Tensor,
    kept: torch.Tensor,
    allowed: torch.Tensor,
    within: int = 0,
    scratch_bytes: int = 64 << 20,
    stored: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch_impl.nearest_kept by the fastest implementation that runs here. stored: the same keys [H, n, D] in the
    pool's dtype, where there are; a kernel that multiplies 16-bit keys takes these."""
    kernel = choose.implementation("merge", k)
    for keys in (stored, k):
        if kernel is not None and keys is not None and kernel.supports(keys):
            return kernel.nearest_kept(keys, dropped, kept, allowed, within)  # type: ignore[no-any-return]
    return torch_impl.nearest_kept(k, dropped, kept, allowed, within, scratch_bytes)


def merge_segments(
    k: torch.Tensor, v: torch.Tensor, lv: torch.Tensor, log_w: torch.Tensor, seg: Segments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch_impl.merge_segments by the fastest implementation that runs here."""
    kernel = choose.implementation("merge", k)
    if kernel is not None and kernel.merges(k) and kernel.merges(v):
        return kernel.merge_segments(k, v, lv, log_w, seg)  # type: ignore[no-any-return]
    return torch_impl.merge_segments(k, v, lv, log_w, seg)


def gather_slots(pool: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """torch_impl.gather_slots by the fastest implementation that runs here."""
    kernel = choose.implementation("merge", pool)
    if kernel is None or not hasattr(kernel, "gather_slots") or not kernel.gathers(pool):
        kernel = torch_impl
    kernel.gather_slots(pool, slots, out)
