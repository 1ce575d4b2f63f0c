"""Rotary embedding written out: a table as SGLang's, and queries turned by complex numbers."""

from __future__ import annotations

import torch

F64 = torch.float64
BASE = 100.0


def table(positions: int, rotated: int, factor: float = 1.0) -> torch.Tensor:
    """[positions, rotated]: cosines, then sines, times `factor`."""
    half = rotated // 2
    angle = torch.arange(positions, dtype=F64)[:, None] * BASE ** (-torch.arange(half, dtype=F64) / half)
    return factor * torch.cat((angle.cos(), angle.sin()), 1)


def rope(x: torch.Tensor, position: float, rotated: int, neox: bool = True) -> torch.Tensor:
    """x [..., D] at one position, pair by pair, on the first `rotated` dimensions."""
    out, half = x.clone(), rotated // 2
    for i in range(half):
        a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(
            torch.tensor(1.0, dtype=F64), torch.tensor(position * BASE ** (-i / half), dtype=F64)
        )
        out[..., a], out[..., b] = turned.real, turned.imag
    return out
