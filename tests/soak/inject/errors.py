"""Shortages and errors that a server must live with; the file KEEPKV_SOAK_FAULT says which one there is now."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from keepkv_sglang.memory.originals import BlockStore
from keepkv_sglang.runtime import compressor, unpack
from keepkv_sglang.runtime.originals import Originals
from tests.soak.control import SAID


def plant(file: Path) -> None:
    def now(name: str) -> bool:
        try:
            return file.read_text() == name
        except OSError:
            return False

    _no_slots(now)
    _no_blocks(now)
    _merge_dies(now)
    _half_of_the_layers(now, "unpack_dies", "read")
    _half_of_the_layers(now, "archive_dies", "write")


def _no_slots(now: Any) -> None:
    """The pool has no slot beside what the row has."""
    real = compressor.allocate

    def allocate(rt: Any, count: int) -> Any:
        return None if now("no_slots") else real(rt, count)

    compressor.allocate = unpack.allocate = allocate


def _no_blocks(now: Any) -> None:
    """Host memory has no block, and nobody gives one up."""
    real = Originals._make_room

    def make_room(self: Originals, blocks: int) -> int:
        return 0 if now("no_blocks") else real(self, blocks)

    Originals._make_room = make_room  # type: ignore[method-assign]


def _merge_dies(now: Any) -> None:
    """Some layers are merged, then there is no memory for the next."""
    for name in ("row_pieces", "packed_pieces"):
        real = getattr(compressor, name)

        def dying(*args: Any, real: Any = real) -> Any:
            done = itertools.count()
            for piece in real(*args):
                yield map(lambda result, done=done: living(result, next(done)), piece)

        setattr(compressor, name, dying)

    def living(result: Any, index: int) -> Any:
        if index == 7 and now("merge_dies"):
            raise MemoryError(SAID)
        return result


def _half_of_the_layers(now: Any, fault: str, name: str) -> None:
    real = getattr(BlockStore, name)

    def half(self: BlockStore, blocks: Any, counts: Any, keys: Any, values: Any, slots: Any) -> None:
        if not now(fault):
            return real(self, blocks, counts, keys, values, slots)
        layers, self.bytes = self.bytes, self.bytes[: len(self.bytes) // 2]
        some = len(self.bytes)
        try:
            real(self, blocks, counts, keys[:some], values[:some], slots)
        finally:
            self.bytes = layers
        raise MemoryError(SAID)

    setattr(BlockStore, name, half)
