"""Which of the pool's slots belong to packed spans, and how each of these shares out its cells.

It is said by slot, so that rows, the prefix cache and SGLang's accounting know nothing of it: whoever holds the slots
of a span, in their order, holds the span. Persistent cost: 4 bytes per slot, and 8 (L H + 1) bytes per packed span
(on a GPU as many on the host).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keepkv_sglang.kernels import cpu_build
from keepkv_sglang.kernels.attention.packed import Cut, Layers, Packed, PackedRows, find_spans
from keepkv_sglang.kernels.host import on_device

FIRST_ROOM = 64  # packed spans; doubled when it is full


class PackedCells:
    """span_of int32 [slots], where the pool is: the number of a slot's packed span, 0 for none. Of a span that is gone
    the number stays until its slots are written again.

    start_address int64 [1] there: the address of the run starts of every number, int64 [numbers, L H + 1]. It stays,
    and so may stand in a CUDA graph; what it says changes where more numbers are needed.
    """

    @staticmethod
    def of(
        keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], log_votes: Sequence[torch.Tensor]
    ) -> PackedCells | None:
        """The pool's layers, as Layers has them (ValueError for layers that differ). None where no kernel reads packed
        spans: on a CPU without C++."""
        readable = not keys[0].is_cpu or cpu_build.implementation("attention") is not None
        return PackedCells(Layers(keys, values, log_votes)) if readable else None

    def __init__(self, layers: Layers) -> None:
        self.layers, self._device = layers, layers.keys[0].device
        self.span_of = torch.zeros(len(layers.keys[0]), dtype=torch.int32, device=self._device)
        self.start_address = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._start = torch.zeros(FIRST_ROOM, len(layers.keys) * layers.heads + 1, dtype=torch.int64)
        self._free = list(range(FIRST_ROOM - 1, 0, -1))
        self._kept: list[torch.Tensor] = []
        self._mirror()

    def _mirror(self) -> None:
        """The run starts on the device; of a CPU they are there. The tables before are kept, all of them smaller than
        this one: a forward in flight may read them on a stream that their memory does not belong to."""
        self._starts = on_device(self._start, self._device)
        if self._starts is not self._start:
            self._kept.append(self._starts)
        self.start_address.fill_(self._starts.data_ptr())

    def reset(self, slots: torch.Tensor) -> None:
        """These slots are about to stand for one token each, in every head."""
        self.span_of.index_fill_(0, slots, 0)

    def add(self, slots: torch.Tensor, counts: torch.Tensor) -> None:
        """`slots` int64 [m] are a packed span from now on. counts int64 [layers, Hkv], on the host: cells of each head,
        m layers Hkv in all (ValueError)."""
        layers, heads = len(self.layers.keys), self.layers.heads
        if counts.shape != (layers, heads) or int(counts.min()) < 0 or int(counts.sum()) != len(slots) * layers * heads:
            raise ValueError(f"{counts.tolist()} does not share out {len(slots)} slots in {layers} layers")
        if not self._free:
            self._collect()
        number = self._free.pop()
        self._start[number, 1:] = counts.flatten().cumsum(0)
        if self._starts is not self._start:
            self._starts[number] = on_device(self._start[number], self._device)
        self.span_of.index_fill_(0, slots, number)

    def slots_in(self, number: int) -> int:
        """How many slots the packed span of this number was made with."""
        return int(self._start[number, -1]) // (len(self.layers.keys) * self.layers.heads)

    def _collect(self) -> None:
        """Numbers that no slot has are free again; where that is few of them, there will be twice as many. Waits for a
        GPU, once in as many compressions as were free."""
        used = set(self.span_of.unique().tolist())
        self._free = [number for number in range(len(self._start) - 1, 0, -1) if number not in used]
        if 2 * len(self._free) < len(self._start):
            room = len(self._start)
            self._start = torch.cat([self._start, torch.zeros_like(self._start)])
            self._free = [*range(2 * room - 1, room - 1, -1), *self._free]
            self._mirror()

    @property
    def used(self) -> bool:
        """Whether there may be packed spans."""
        return len(self._free) < len(self._start) - 1

    def rows(self, table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor) -> PackedRows | None:
        """What attention on a CPU reads of rows int64 [B] of table int32 [R, C], lens int64 [B]; None: no packed spans
        there."""
        if not self.used:
            return None
        kernel = cpu_build.implementation("attention")
        assert kernel is not None, "without it nothing is packed"
        cut: Cut = kernel.cut(table, rows, lens, self.span_of)
        if not len(cut.spans):
            return None
        return PackedRows(cut, Packed(self.layers, cut.first, cut.at, cut.slots, self._start[cut.spans]))

    def of_row(self, slots: torch.Tensor, behind: torch.Tensor | None = None) -> tuple[torch.Tensor, Packed | None]:
        """Slots int64 [n] of a row -> those that are no part of packed spans, and these spans, if there are any; all of
        Packed but the slots on the host, which waits for a GPU. behind: further slots of the row, none of them packed
        (AssertionError)."""
        if not self.used:
            return slots, None
        more = slots if behind is None else torch.cat([slots, behind])
        spans = self.span_of[more].cpu()
        assert behind is None or not spans[len(slots) :].any()
        raw, inside, at, numbers = find_spans(spans[: len(slots)])
        if not len(numbers):
            return slots, None
        mine = slots[on_device(inside, self._device)].to(torch.int32)
        packed = Packed(self.layers, torch.tensor([0, len(numbers)]), at, mine, self._start[numbers])
        return slots[on_device(raw, self._device)], packed

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.span_of, self._start))
