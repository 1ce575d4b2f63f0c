"""Several layers at once: their heads side by side, as if they were one layer's.

Heads are independent of each other in everything that compress/layer.py does, so layers are too. A reply's interval is
small: one layer at a time, 30 layers spend most of their time on starting operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch

from keepkv_sglang.compress.layer import LayerInput, LayerResult, compress_layer, gpu_kernel_scores, heads_at_once
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.kernels.attention.packed import Packed, gather_cells
from keepkv_sglang.kernels.merge import gather_slots

SCRATCH_BYTES = 128 << 20
"""Working memory of the layers that are merged at once, on a CPU and where a GPU has little memory left."""
GPU_SCRATCH_BYTES = 1 << 30
"""On a GPU, whose time is starting operations: an 8B's turn of 2,000 tokens is two groups of layers instead of 16."""
QUERY_TENSORS = 6
"""How many [heads, queries, D] of float32 exist at once on a GPU: queries, outputs and what the fit makes of them."""


@functools.cache
def scratch_bytes(device: torch.device) -> int:
    """How much a compression on `device` takes: at most a quarter of what is free there when it is first asked for."""
    if device.type != "cuda":
        return SCRATCH_BYTES
    return max(SCRATCH_BYTES, min(GPU_SCRATCH_BYTES, torch.cuda.mem_get_info(device)[0] // 4))


class Reading(Protocol):
    """K and V of a span that do not lie in its slots, of one token each."""

    tokens: int

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k [tokens, Hkv, D] and v [tokens, Hkv, Dv] of a layer, until it is called again."""
        ...


@dataclass(frozen=True)
class Rows:
    """Which slots: context [c] before the span, source [n] the span's, target [m] for the result, all int64. reading:
    what is merged instead of the source. packed: of the context, the packed spans; `context` are its other slots."""

    context: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    reading: Reading | None = None
    packed: Packed | None = None

    @property
    def n(self) -> int:
        """How many K and V per head are merged."""
        return len(self.source) if self.reading is None else self.reading.tokens

    @property
    def context_tokens(self) -> int:
        """How many K and V precede them, per head on average."""
        return len(self.context) + (len(self.packed.slots) if self.packed is not None else 0)


@dataclass(frozen=True)
class Storage:
    """The model's layers in order: keys[i] [slots, Hkv, D], values[i] [slots, Hkv, Dv], log_votes[i] [slots, Hkv]
    float32, scales[i] the softmax scale."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    log_votes: Sequence[torch.Tensor]
    scales: Sequence[float]


def compress_rows(
    storage: Storage,
    rows: Rows,
    queries: Callable[[int], torch.Tensor],
    q_heads: int,
    q_index: torch.Tensor,
    policy: SpanPolicy,
    scratch_bytes: int,
) -> Iterator[LayerResult]:
    """Merges the span of every layer into rows.target; mutates keys, values and log votes there, nothing else.

    queries(i): the queries of layer i [w, q_heads, D], q_index [w] as in LayerInput. Yields each layer's result in
    order, after it is written. As many layers at once as `scratch_bytes` hold: the logits of all their heads, and K
    and V of context and span; one layer where that is too much, or on a CPU as many as give every thread a head.
    """
    return chain.from_iterable(row_pieces(storage, rows, queries, q_heads, q_index, policy, scratch_bytes))


def row_pieces(
    storage: Storage,
    rows: Rows,
    queries: Callable[[int], torch.Tensor],
    q_heads: int,
    q_index: torch.Tensor,
    policy: SpanPolicy,
    scratch_bytes: int,
    most_layers: int | None = None,
) -> Iterator[Iterable[LayerResult]]:
    """compress_rows, one group of at most `most_layers` layers after the other. Between two pieces time may pass, as
    long as nothing that is read changes. A piece is written while it is iterated, before the next one is asked for."""
    if not storage.keys:  # the simulator's pool has no layers
        return
    for layers in layer_groups(storage, rows, len(q_index), q_heads, scratch_bytes, most_layers):
        x = layer_input(storage, rows, layers, queries, q_index)
        yield _written(storage, rows.target, layers, compress_layer(x, policy, scratch_bytes))


def _written(
    storage: Storage, target: torch.Tensor, layers: Sequence[int], result: LayerResult
) -> Iterator[LayerResult]:
    """Each layer's part of the result, when it is in its slots."""
    count = len(layers)
    parts = zip(
        layers,
        result.kept.chunk(count),
        result.assign.chunk(count),
        result.k.chunk(count, dim=1),
        result.v.chunk(count, dim=1),
        result.lv.chunk(count, dim=1),
        strict=True,
    )
    for layer, kept, assign, k, v, lv in parts:
        storage.keys[layer][target] = k
        storage.values[layer][target] = v
        storage.log_votes[layer][target] = lv
        yield LayerResult(kept, assign, k, v, lv)


def layer_input(
    storage: Storage,
    rows: Rows,
    layers: Sequence[int],
    queries: Callable[[int], torch.Tensor],
    q_index: torch.Tensor,
    context: bool = True,
) -> LayerInput:
    """The heads of some layers side by side. context: whether what precedes the span is read, too."""
    k, v, lv = _span(storage, rows, layers)
    k_ctx, lv_ctx = _context(storage, rows, layers) if context else (k[:0], lv[:0])
    q = _side_by_side([queries(i) for i in layers])
    return LayerInput(q, q_index, k_ctx, lv_ctx, k, v, lv, storage.scales[layers[0]])


def layer_groups(
    storage: Storage, rows: Rows, queries: int, q_heads: int, scratch_bytes: int, most_layers: int | None = None
) -> list[list[int]]:
    """Consecutive layers of one softmax scale and one shape of K and V, as many as fit (compress_rows), at most
    `most_layers`."""
    groups: list[list[int]] = []
    for layer, (keys, values, scale) in enumerate(zip(storage.keys, storage.values, storage.scales, strict=True)):
        span, size = rows.n * (keys.shape[1:].numel() + values.shape[1:].numel()), keys.element_size()
        if gpu_kernel_scores(keys):
            stored = (span + rows.context_tokens * keys.shape[1:].numel()) * size
            needed = stored + 4 * (span + QUERY_TENSORS * queries * q_heads * keys.shape[2])
        else:
            numbers = span + rows.context_tokens * (keys.shape[1:].numel() + values.shape[1:].numel())
            # As compress/layer.py._head_groups counts them.
            needed = max(numbers, 2 * rows.n * queries * q_heads, 1) * max(4, size)
        most = max(-(-heads_at_once(keys) // keys.shape[1]), scratch_bytes // needed)
        most = min(most, most_layers or most)
        first = groups[-1][0] if groups else layer
        alike = storage.scales[first] == scale and _shape(storage, first) == _shape(storage, layer)
        if groups and alike and len(groups[-1]) < most:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _shape(storage: Storage, layer: int) -> tuple[torch.Size, torch.Size]:
    return storage.keys[layer].shape[1:], storage.values[layer].shape[1:]


def _span(storage: Storage, rows: Rows, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v and log votes of what is merged, as _gather returns them."""
    if rows.reading is None:
        return (
            _gather(storage.keys, layers, rows.source),
            _gather(storage.values, layers, rows.source),
            _gather(storage.log_votes, layers, rows.source),
        )
    parts = []
    for buffers in (storage.keys, storage.values):
        shape = buffers[layers[0]].shape[1:]
        parts.append(buffers[layers[0]].new_empty(len(layers), shape[0], rows.n, shape[1]))
    for at, layer in enumerate(layers):
        for part, whole in zip(parts, rows.reading.layer(layer), strict=True):
            part[at] = whole.transpose(0, 1)
    keys, values = (part.flatten(0, 1).transpose(0, 1) for part in parts)
    votes = storage.log_votes[layers[0]]
    return keys, values, votes.new_zeros(len(layers) * votes.shape[1], rows.n).transpose(0, 1)


def _context(storage: Storage, rows: Rows, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and log votes of what precedes the span, as _gather returns them. Heads with fewer cells than others in
    packed spans have entries without a vote instead."""
    if rows.packed is None:
        return _gather(storage.keys, layers, rows.context), _gather(storage.log_votes, layers, rows.context)
    slots, heads = len(rows.context), storage.keys[layers[0]].shape[1]
    cells = gather_cells(rows.packed, layers, rows.packed.longest(layers))
    parts = []
    for buffers, packed in zip((storage.keys, storage.log_votes), cells, strict=True):
        own = buffers[layers[0]].new_empty(len(layers), heads, slots, *packed.shape[2:])
        for at, layer in zip(own, layers, strict=True):
            gather_slots(buffers[layer], rows.context, at)
        parts.append(torch.cat([own.flatten(0, 1), packed], dim=1).transpose(0, 1))
    return parts[0], parts[1]


def _gather(buffers: Sequence[torch.Tensor], layers: Sequence[int], slots: torch.Tensor) -> torch.Tensor:
    """[len(slots), layers * heads, ...], a view of memory that lies head by head: so it is read from here on."""
    shape = buffers[layers[0]].shape[1:]
    out = buffers[layers[0]].new_empty(len(layers), shape[0], len(slots), *shape[1:])
    for at, layer in zip(out, layers, strict=True):
        gather_slots(buffers[layer], slots, at)
    return out.flatten(0, 1).transpose(0, 1)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
