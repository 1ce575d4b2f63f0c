"""Moves queries to other positions: rotary embedding undone where they stood and done again elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from keepkv_sglang.compress.transfer import on_device


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of all layers.

    cos_sin [P, R]: cosines of positions 0..P-1, then sines, R / 2 frequencies each, as SGLang's
    RotaryEmbedding.cos_sin_cache; R <= D, the rest of D is not rotated. neox: pairs are (i, i + R / 2), otherwise
    (2 i, 2 i + 1). A factor on the table (YaRN) is that of the queries already and stays what it is.
    """

    cos_sin: torch.Tensor
    neox: bool = True

    def turn(self, source: torch.Tensor, target: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Turn:
        """What takes query j from position source[j] to target[j] (int64 [w]), for queries of `dtype` on `device`.

        R(target) R(source)^-1; arithmetic in float32 or wider. Positions past the table count as its last.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        (cos_a, sin_a), (cos_b, sin_b) = (self._angles(at, dtype, device) for at in (source, target))
        square = cos_a.square() + sin_a.square()
        cos, sin = (cos_b * cos_a + sin_b * sin_a) / square, (sin_b * cos_a - cos_b * sin_a) / square
        return Turn(cos, sin, self.neox)

    def _angles(
        self, position: torch.Tensor, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [w, 1, R / 2]."""
        at = on_device(position, self.cos_sin.device).clamp(max=self.cos_sin.shape[0] - 1)
        cos, sin = self.cos_sin[at].to(dtype).to(device)[:, None].chunk(2, dim=-1)
        return cos, sin


@dataclass(frozen=True)
class Turn:
    """A rotation per query, the same in every layer: cos, sin [w, 1, R / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor
    neox: bool

    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        """q [w, Hq, D] after RoPE -> the same queries at their new positions, in q's dtype. Mutates nothing."""
        rotated = 2 * self.cos.shape[2]
        x, rest = q[..., :rotated].to(self.cos.dtype), q[..., rotated:].to(self.cos.dtype)
        a, b = x.chunk(2, dim=-1) if self.neox else (x[..., 0::2], x[..., 1::2])
        pair = (a * self.cos - b * self.sin, b * self.cos + a * self.sin)
        moved = torch.cat(pair, dim=-1) if self.neox else torch.stack(pair, dim=-1).flatten(-2)
        return torch.cat((moved, rest), dim=-1).to(q.dtype)
