"""For bench_span_quality, beside tools/evaluate: queries, keys and values of a whole text at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from keepkv_sglang.tools.evaluate.probe import Agreement, Probe, Slots, agreement

FOLLOWING = 128  # teacher-forced tokens


class Layer(NamedTuple):
    """Of one layer, positions first: q [T, Hq, D] after RoPE, unscaled; k, v [T, Hkv, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class SpanProbe(Probe):
    """The probe of `keepkv eval`, asked for layers and for rows made of given slots."""

    def prefill(self, tokens: Sequence[int], last: int) -> tuple[list[Layer], torch.Tensor]:
        """All layers over `tokens`, and the log-probabilities at the last `last` of them, [last, vocabulary]."""
        row = self.row()
        log_probs = row.feed(tokens, last)
        return [Layer(q, x.k, x.v) for q, x in zip(row.queries, row.layers, strict=True)], log_probs

    def score(self, past: Sequence[Slots], start: int, tokens: Sequence[int], full: torch.Tensor) -> Agreement:
        """`tokens` at logical positions from `start` over `past`, against `full` [len(tokens), vocabulary]."""
        row = self.row()
        row.layers, row.tokens = list(past), start
        return agreement(full, row.feed(tokens), tokens)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, back: bool = False) -> torch.Tensor:
        """RoPE of the model on x [T, H, D] at positions [T]; `back` undoes it."""
        zero = torch.zeros_like(positions)
        source, target = (positions, zero) if back else (zero, positions)
        return self.rotary.turn(source, target, x.dtype, x.device)(x)
