"""Methods that `keepkv eval` compares: names -> how a prefilled row becomes smaller.

Ours are settings of the server's own configuration (config.py) run through the server's own compress_layer; peers are
in peers.py. A method that needs its own prefill says so with `prefill`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from keepkv_sglang.compress.by_head import merge_scored, score_heads
from keepkv_sglang.compress.heads import slots_of_heads
from keepkv_sglang.compress.layer import LayerInput, LayerResult, compress_layer
from keepkv_sglang.compress.packed import shares_cells
from keepkv_sglang.compress.queries.references import QuerySample
from keepkv_sglang.compress.select import SpanPolicy, left_raw
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.evaluate.probe import Probe, Row, Slots, joined
from keepkv_sglang.tools.evaluate.results import OFF
from keepkv_sglang.turn.queries import reference_positions
from keepkv_sglang.turn.spans import DueSpan


class Method(Protocol):
    """One way to compress a prompt."""

    @property
    def name(self) -> str:
        """As in the results; the same name is the same measurement."""
        ...

    def prefill(self, probe: Probe, ids: Sequence[int], budget: float, full: Row | None = None) -> Row:
        """A row that stands for `ids` in ceil(budget * len(ids)) slots per layer.

        full: the same tokens prefilled without compression, if the caller has them; it is not changed.
        """
        ...


@dataclass(frozen=True)
class Full:
    """The full cache."""

    name: str = "full"

    def prefill(self, probe: Probe, ids: Sequence[int], budget: float, full: Row | None = None) -> Row:
        return full.clone() if full is not None else probe.row(ids)


@dataclass(frozen=True)
class Ours:
    """A configuration of this project; `config.budget` is replaced by the budget asked for.

    offline_scorer: a scorer that no server can run (h2o); it replaces config.scorer and sees every query fed last.
    originals: for tasks of several turns, results.ORIGINALS; one compression is the same with and without.
    """

    name: str
    config: KeepKVConfig
    offline_scorer: str = ""
    originals: str = OFF

    def prefill(self, probe: Probe, ids: Sequence[int], budget: float, full: Row | None = None) -> Row:
        row = full.clone() if full is not None else probe.row(ids)
        m = slots_of(budget, len(ids))
        compress_tail(row, self.config, m, offline_scorer=self.offline_scorer)
        return row


def slots_of(budget: float, tokens: int) -> int:
    """ceil(budget * tokens), as the server counts (KeepKVConfig.kept_slots)."""
    return max(1, math.ceil(budget * tokens - 1e-9))


def compress_tail(
    row: Row, config: KeepKVConfig, m: int, start: int = 0, offline_scorer: str = "", carried: int = 0
) -> int:
    """Slots [start, end) of the row become m; returns how many of the last are raw (selection.left_raw).

    What compressor.py does on the server: the span is everything behind `start`, one slot per token where the window
    lies; its first `carried` slots are what its predecessor left raw. Nothing happens when m >= its slots.
    """
    n = row.slots - start
    if m >= n:
        return 0
    policy = span_policy(config, m, sinks=config.sinks if start == 0 else 0, carried=carried)
    compress_with(row, config, policy, start, offline_scorer)
    return left_raw(policy, n)


def compress_with(
    row: Row, config: KeepKVConfig, policy: SpanPolicy, start: int = 0, offline_scorer: str = ""
) -> list[list[LayerResult]]:
    """Slots [start, end) of the row become policy.m, scored by window and reference queries of the tokens fed last.
    Returns what was chosen: each layer's result, or one per head."""
    if offline_scorer:
        policy = replace(policy, scorer=offline_scorer)
    n = row.slots - start
    positions, references = _queries(row, config, n if offline_scorer else config.window)
    return _compress_slots(row, policy, positions, references, start, n, row.tokens)


def _queries(row: Row, config: KeepKVConfig, window: int) -> tuple[list[int], int]:
    """Positions of reference and window queries among the tokens fed last, and how many are references."""
    fed = row.tokens - row.queries[0].shape[0]  # the first token that has a query
    lo = max(fed, row.tokens - window)
    spread = reference_positions(fed, lo, config.references)
    return [*spread, *range(lo, row.tokens)], len(spread)


def compress_span(row: Row, due: DueSpan) -> list[list[LayerResult]]:
    """What runtime/compressor.py does on the server to one span that is due."""
    held = due.queries
    positions = list(held.positions[: held.filled])
    return _compress_slots(row, due.policy, positions, held.references, due.start, due.slots, due.end)


def _compress_slots(
    row: Row, policy: SpanPolicy, positions: Sequence[int], references: int, start: int, n: int, end: int
) -> list[list[LayerResult]]:
    """The n slots from `start` on, which end before token `end`, become policy.m; positions: of their queries, which
    must be among the tokens fed last. Returns each layer's result, or one per head."""
    inputs = list(_layer_inputs(row, positions, references, start, n, end))
    behind = [layer.cut(start + n, row.slots) for layer in row.layers]
    left = left_raw(policy, n)
    if not shares_cells(policy, left):
        results = [[compress_layer(x, policy)] for x in inputs]
        layers = [Slots(r.k, r.v, r.lv) for (r,) in results]
        row.replace_span([joined(*parts) for parts in zip(layers, behind, strict=True)], start)
        return results
    scored = [score_heads(x, policy) for x in inputs]
    scores = torch.stack([torch.cat([group.scores for group in layer]) for layer in scored])
    counts = slots_of_heads(scores, policy, policy.heads)
    results = [merge_scored(x, policy, s, c) for x, s, c in zip(inputs, scored, counts, strict=True)]
    cells = [_cells(layer, policy, left) for layer in results]
    row.replace_span([joined(*parts) for parts in zip((raw for raw, _ in cells), behind, strict=True)], start)
    row.cells = [joined(*parts) for parts in zip(row.cells, (packed for _, packed in cells), strict=True)]
    return results


def _cells(heads: Sequence[LayerResult], policy: SpanPolicy, left: int) -> tuple[Slots, Slots]:
    """A packed span in a layer: its m slots, those that are shared out without a vote, and what the heads have instead,
    heads with less filled up with entries without a vote."""
    whole, m, most = policy.whole_tokens, policy.m, max(r.kept.shape[1] for r in heads)
    raw, packed = [], []
    for r in heads:
        count = r.kept.shape[1]
        parts = [(x[:whole], x[whole : count - left], x[count - left :]) for x in (r.k, r.v, r.lv)]
        gaps = [
            x.new_full((m - whole - left, *x.shape[1:]), fill) for x, fill in zip((r.k, r.v, r.lv), FILL, strict=True)
        ]
        raw.append(Slots(*(torch.cat((a, gap, b)) for (a, _, b), gap in zip(parts, gaps, strict=True))))
        packed.append(
            Slots(*(_padded(x, most - whole - left, fill) for (_, x, _), fill in zip(parts, FILL, strict=True)))
        )
    return _beside(raw), _beside(packed)


FILL = (0.0, 0.0, -math.inf)
"""Key, value and log vote of an entry that no head has."""


def _beside(heads: Sequence[Slots]) -> Slots:
    """The heads of a layer."""
    return Slots(*(torch.cat(part, 1) for part in zip(*heads, strict=True)))


def _padded(x: torch.Tensor, rows: int, fill: float) -> torch.Tensor:
    return torch.cat((x, x.new_full((rows - x.shape[0], *x.shape[1:]), fill)))


def _layer_inputs(
    row: Row, positions: Sequence[int], references: int, start: int, n: int, end: int
) -> Iterator[LayerInput]:
    """What compress_layer gets of each layer, for the n slots from `start` on, which end before token `end`."""
    device = row.queries[0].device
    rows = torch.tensor(positions, device=device) - (row.tokens - row.queries[0].shape[0])
    sample = QuerySample(list(positions), references, end, n, row.probe.rotary, torch.float32, device)
    for index, (layer, queries) in enumerate(zip(row.layers, row.queries, strict=True)):
        context, span = row.context(index, start), layer.cut(start, start + n)
        q = sample.place(queries[rows])
        yield LayerInput(q, sample.q_index, context.k, context.lv, span.k, span.v, span.lv, row.probe.scale)


def ours(name: str, **settings: object) -> Ours:
    """`settings` are fields of KeepKVConfig; without reference queries, and with the same number of tokens in every
    head, as the papers have it, unless asked for."""
    published = {"references": 0, "heads": "uniform"}
    return Ours(name, KeepKVConfig(enabled=True, **{**published, **settings}))  # type: ignore[arg-type]


SNAPKV = "snapkv evict"
RELEASED = "keepkv mean 0.8 (released)"
DEFAULT = "default"

OURS: dict[str, Ours] = {
    method.name: method
    for method in (
        Ours(DEFAULT, KeepKVConfig(enabled=True)),
        ours(SNAPKV, scorer="snapkv", merge="evict"),
        ours(RELEASED, scorer="keepkv", merge="mean", threshold=0.8),
        ours("keepkv evict", scorer="keepkv", merge="evict"),
        ours("keepkv zip (paper)", scorer="keepkv", merge="zip", threshold=0.8),
        ours("snapkv mean", scorer="snapkv", merge="mean", threshold=0.6),
        ours("snapkv tangent", scorer="snapkv", merge="tangent", threshold=0.6),
        ours("snapkv least_squares", scorer="snapkv", merge="least_squares", threshold=0.6),
        ours("snapkv value_refit", scorer="snapkv", merge="value_refit", threshold=0.6),
        ours("rms attention_matching, no references", scorer="rms", merge="attention_matching"),
        ours("rms attention_matching, 128 references", scorer="rms", merge="attention_matching", references=128),
        ours("rms least_squares, 256 references", scorer="rms", merge="least_squares", references=256, threshold=0.6),
        ours("rms evict, 256 references", scorer="rms", merge="evict", references=256),
        ours("keydiff evict", scorer="keydiff", merge="evict"),
        ours("knorm evict", scorer="knorm", merge="evict"),
        ours("tova evict", scorer="tova", merge="evict"),
        ours("gkv evict", scorer="gkv", merge="evict"),
        ours("value_norm evict", scorer="value_norm", merge="evict"),
        ours("expected_attention evict", scorer="expected_attention", merge="evict"),
        ours("streaming_llm evict", scorer="streaming_llm", merge="evict"),
        ours("chunkkv evict", scorer="snapkv", merge="evict", chunk=10),
        *(Ours(f"heads {name}", KeepKVConfig(enabled=True, heads=name)) for name in ("uniform", "layer", "all")),
        replace(ours("h2o evict", merge="evict"), offline_scorer="h2o"),
    )
}
