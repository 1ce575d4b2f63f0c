"""Expected Attention as published: the queries of the whole prompt, as they would be at future positions.

Offline: a server keeps the last queries only. Its own form of it is the scorer `expected_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from keepkv_sglang.compress.layer import LayerInput, compress_layer
from keepkv_sglang.compress.scorers.expected_attention_full import FUTURE, SINKS
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.evaluate.methods import slots_of
from keepkv_sglang.tools.evaluate.probe import Probe, Row, Slots


@dataclass(frozen=True)
class ExpectedAttentionFull:
    """Scorer expected_attention_full with the other settings of `config` (its window and sinks are not read)."""

    name: str
    config: KeepKVConfig

    def prefill(self, probe: Probe, ids: Sequence[int], budget: float, full: Row | None = None) -> Row:
        """As methods.Method. The queries of `full` must be those of all of `ids`: ids fed at once."""
        row = full.clone() if full is not None else probe.row(ids)
        n, m = len(ids), slots_of(budget, len(ids))
        if m >= row.slots:
            return row
        policy = replace(span_policy(self.config, m, sinks=min(SINKS, m)), scorer="expected_attention_full")
        layers = []
        for layer, q in zip(row.layers, row.queries, strict=True):
            ahead = same_moments(mean_future(probe, q, n, FUTURE)[SINKS:])
            index = torch.full((len(ahead),), n - 1)  # from the future, everything is seen
            none = layer.cut(0, 0)
            result = compress_layer(
                LayerInput(ahead, index, none.k, none.lv, layer.k, layer.v, layer.lv, probe.scale), policy
            )
            layers.append(Slots(result.k, result.v, result.lv))
        row.replace_span(layers)
        return row


def mean_future(probe: Probe, q: torch.Tensor, end: int, count: int) -> torch.Tensor:
    """q [end, Hq, D] after RoPE, of positions 0 .. end - 1 -> the same shape: query j under the mean rotation of
    positions end .. end + count - 1, (mean_t R(end + t)) R(j)^-1 q_j.

    What the paper (arXiv 2510.00636) does to mean and covariance of the queries before RoPE; the map is linear, so
    it can be done to each query as well. A factor on the rotary table (YaRN) is that of the queries already.
    """
    assert len(q) == end, "queries of the whole prompt"
    cos, sin = (
        t[0, :, None] for t in probe.model.model.rotary_emb(q, torch.arange(end + count, device=q.device)[None])
    )
    square = cos.square() + sin.square()
    before = (q * cos[:end] - half_turn(q) * sin[:end]) / square[:end]
    return before * cos[end:].mean(0) + half_turn(before) * sin[end:].mean(0)


def same_moments(q: torch.Tensor) -> torch.Tensor:
    """q [w, Hq, D] -> [2 D, Hq, D] with the mean and covariance (divided by w) of q in every head: mean +- sqrt(D l) e
    for each eigenvalue l and unit eigenvector e of the covariance. The scorer reads only these two moments, and 128
    queries cost a tenth of a prompt's."""
    x = q.double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.einsum("whd,whe->hde", x - mean, x - mean) / len(x))
    steps = vectors.mT * (values.clamp(min=0) * x.shape[2]).sqrt()[..., None]  # [Hq, D, D]: a step per row
    return torch.cat((mean[:, None] + steps, mean[:, None] - steps), dim=1).transpose(0, 1).to(q.dtype)


def half_turn(x: torch.Tensor) -> torch.Tensor:
    """Each pair (i, i + D / 2) turned by 90 degrees, as Hugging Face rotates."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


EXPECTED_ATTENTION_FULL = ExpectedAttentionFull(
    "expected_attention_full evict", KeepKVConfig(enabled=True, merge="evict")
)
