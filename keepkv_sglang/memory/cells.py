"""Which of the pool's slots belong to packed spans, and how each of these shares out its cells.

It is said by slot, so that rows, the prefix cache and SGLang's accounting know nothing of it: whoever holds the slots
of a span, in their order, holds the span. Persistent cost: 4 bytes per slot, and 8 (L H + 1) bytes per packed span.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from keepkv_sglang.kernels import choose
from keepkv_sglang.kernels.attention.packed import Cut, Layers, Packed, PackedRows

FIRST_ROOM = 64  # packed spans; doubled when it is full


class PackedCells:
    """span_of int32 [slots]: the number of a slot's packed span, 0 for none. Of a span that is gone the number stays
    until its slots are written again."""

    @staticmethod
    def of(
        keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], log_votes: Sequence[torch.Tensor]
    ) -> PackedCells | None:
        """The pool's layers, as Layers has them (ValueError for layers that differ). None where no kernel reads packed
        spans: on a GPU, and without the C++ kernels."""
        kernel = choose.implementation("attention", keys[0])
        return PackedCells(Layers(keys, values, log_votes), kernel) if hasattr(kernel, "cut") else None

    def __init__(self, layers: Layers, kernel: Any) -> None:
        """kernel: an implementation of attention that has cut()."""
        self.layers, self._kernel = layers, kernel
        self.span_of = torch.zeros(len(layers.keys[0]), dtype=torch.int32)
        self._start = torch.zeros(FIRST_ROOM, len(layers.keys) * layers.heads + 1, dtype=torch.int64)
        self._free = list(range(FIRST_ROOM - 1, 0, -1))

    def reset(self, slots: torch.Tensor) -> None:
        """These slots are about to stand for one token each, in every head."""
        self.span_of[slots] = 0

    def add(self, slots: torch.Tensor, counts: torch.Tensor) -> None:
        """`slots` int64 [m] are a packed span from now on. counts int64 [layers, Hkv]: cells of each head, m layers Hkv
        in all (ValueError)."""
        layers, heads = len(self.layers.keys), self.layers.heads
        if counts.shape != (layers, heads) or int(counts.min()) < 0 or int(counts.sum()) != len(slots) * layers * heads:
            raise ValueError(f"{counts.tolist()} does not share out {len(slots)} slots in {layers} layers")
        if not self._free:
            self._collect()
        number = self._free.pop()
        self._start[number, 1:] = counts.flatten().cumsum(0)
        self.span_of[slots] = number

    def slots_in(self, number: int) -> int:
        """How many slots the packed span of this number was made with."""
        return int(self._start[number, -1]) // (len(self.layers.keys) * self.layers.heads)

    def _collect(self) -> None:
        """Numbers that no slot has are free again; where that is few of them, there will be twice as many."""
        used = set(self.span_of.unique().tolist())
        self._free = [number for number in range(len(self._start) - 1, 0, -1) if number not in used]
        if 2 * len(self._free) < len(self._start):
            room = len(self._start)
            self._start = torch.cat([self._start, torch.zeros_like(self._start)])
            self._free = [*range(2 * room - 1, room - 1, -1), *self._free]

    def rows(self, table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor) -> PackedRows | None:
        """What attention reads of rows int64 [B] of table int32 [R, C], lens int64 [B]; None: no packed spans there."""
        if len(self._free) == len(self._start) - 1:
            return None
        cut: Cut = self._kernel.cut(table, rows, lens, self.span_of)
        if not len(cut.spans):
            return None
        return PackedRows(cut, Packed(self.layers, cut.first, cut.at, cut.slots, self._start[cut.spans]))

    def of_row(self, slots: torch.Tensor) -> tuple[torch.Tensor, Packed | None]:
        """Slots int64 [n] of a row -> those that are no part of packed spans, and these spans, if there are any."""
        table, row = slots.to(torch.int32)[None], torch.zeros(1, dtype=torch.int64)
        found = self.rows(table, row, torch.tensor([len(slots)]))
        if found is None:
            return slots, None
        return found.cut.table[0, : int(found.cut.lens[0])].to(torch.int64), found.packed

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.span_of, self._start))
