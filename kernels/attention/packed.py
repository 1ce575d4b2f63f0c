"""Packed spans: m slots whose cells are shared out over layers and kv heads.

A slot has a **cell**, one K and one V vector with a log vote, for each layer and kv head. An ordinary slot's cells all
stand for the same token. In a packed span every head of every layer has a **run** of cells of its own, as many as it
needs: the span's cells are numbered over (layer, slot, head),

    cell f lies in layer f // (m H), slot f % (m H) // H of the span, head f % H,

and the run of (l, h) is [start[l H + h], start[l H + h + 1]). So all that a span needs beside its slots is `start`.
Which of a row's slots belong to a packed span is said by slot (`span_of`): rows stay lists of slots.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.host import on_device


@dataclass(frozen=True)
class Layers:
    """The pool: keys, values [S, H, D] and log_votes float32 [S, H] of every layer, alike in shape, dtype and strides
    (ValueError otherwise: a cell of one layer is read as if it were another's)."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    log_votes: Sequence[torch.Tensor]

    def __post_init__(self) -> None:
        for buffers in (self.keys, self.values, self.log_votes):
            if len({(x.shape, x.dtype, x.stride(), x.device) for x in buffers}) != 1:
                raise ValueError("packed spans need layers of one shape, dtype and layout: use heads uniform")

    @property
    def heads(self) -> int:
        """kv heads of a layer."""
        return self.keys[0].shape[1]

    @cached_property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int64 [layers]: addresses of keys, values and votes."""
        return tuple(  # type: ignore[return-value]
            torch.tensor([x.data_ptr() for x in buffers]) for buffers in (self.keys, self.values, self.log_votes)
        )

    @cached_property
    def offsets(self) -> torch.Tensor:
        """int64 [3, layers], where the pool is: keys, values and votes of each layer, in elements from those of the
        first layer. ValueError where a layer begins at no multiple of 8 elements from it: a kernel reads that many at
        once."""
        found = []
        for buffers in (self.keys, self.values, self.log_votes):
            size, first = buffers[0].element_size(), buffers[0].data_ptr()
            bytes_ = [x.data_ptr() - first for x in buffers]
            if any(distance % (8 * size) for distance in bytes_):
                raise ValueError("packed spans need layers that begin at multiples of 8 elements: use heads uniform")
            found.append([distance // size for distance in bytes_])
        return on_device(torch.tensor(found), self.keys[0].device)


@dataclass(frozen=True)
class Packed:
    """The packed spans of a batch, for attention in layer `layer`.

    On the host, but for `slots`, which are where the pool is. first int64 [B + 1]: request b has spans first[b] ..
    first[b + 1] - 1. at int64 [spans + 1]: span s has slots[at[s] : at[s + 1]], int32. start int64
    [spans, L * H + 1] as above.
    """

    layers: Layers
    first: torch.Tensor
    at: torch.Tensor
    slots: torch.Tensor
    start: torch.Tensor
    layer: int = 0

    def runs(self, request: int, layer: int, head: int) -> torch.Tensor:
        """int64 [cells, 3]: (layer, slot, head) of each cell that a head reads, in order."""
        heads = self.layers.heads
        found = [torch.empty(0, 3, dtype=torch.int64)]
        for s in range(int(self.first[request]), int(self.first[request + 1])):
            slots = self.slots[self.at[s] : self.at[s + 1]].long()
            run = layer * heads + head
            f = torch.arange(int(self.start[s, run]), int(self.start[s, run + 1]))
            each = len(slots) * heads
            found.append(torch.stack([f // each, slots[f % each // heads], f % heads], 1))
        return torch.cat(found)

    def longest(self, layers: Sequence[int]) -> int:
        """Most cells of a head of these layers, over the spans of the first request."""
        counts = self.start[: self.first.tolist()[1]].diff(dim=1).sum(dim=0)
        return max(counts.view(-1, self.layers.heads)[list(layers)].flatten().tolist())


@dataclass(frozen=True)
class Cut:
    """Rows without their packed spans: table int32 [B, C], rows int64 [B] (0, 1, ...), lens int64 [B]. first, at, slots
    as in Packed; spans int64: the number of each span in span_of."""

    table: torch.Tensor
    rows: torch.Tensor
    lens: torch.Tensor
    first: torch.Tensor
    at: torch.Tensor
    slots: torch.Tensor
    spans: torch.Tensor


@dataclass(frozen=True)
class PackedRows:
    """A batch whose rows have packed spans: what is left of the rows, and the spans."""

    cut: Cut
    packed: Packed


def find_spans(spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a row's packed spans are: spans int32 [n] on the host, the number of each slot's span, 0: none. Returns
    int64 indices of the slots in none, of the others, `at` of these as Packed has it, and the number of each span."""
    before = torch.cat([spans.new_zeros(1), spans[:-1]])
    inside = spans.nonzero()[:, 0]
    opens = (spans != before)[inside].nonzero()[:, 0]
    return (
        (spans == 0).nonzero()[:, 0],
        inside,
        torch.cat([opens, opens.new_tensor([len(inside)])]),
        spans[inside][opens],
    )


def gather_cells(packed: Packed, layers: Sequence[int], room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cpp_impl.gather_cells, by the kernel that runs where the pool is."""
    on_cpu = packed.slots.is_cpu and not choose.interpreted()
    # Imported where it is used: both import this file.
    kernel = importlib.import_module(f".{'cpp_impl' if on_cpu else 'triton_packed'}", __package__)
    return kernel.gather_cells(packed, layers, room)  # type: ignore[no-any-return]
