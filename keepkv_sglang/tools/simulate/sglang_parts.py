"""What the simulator has in its own way: SGLang's allocator and global configuration, and an archive without bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.runtime_context import get_context

from keepkv_sglang.memory.originals import BLOCK_TOKENS, BlockLayout, BlockStore, Staging
from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.runtime.originals import Originals
from keepkv_sglang.settings.config import KeepKVConfig


class HugeAllocator(TokenToKVPoolAllocator):
    """For pools that never run out: SGLang's copies the whole free list with every free, this one when it is needed."""

    free_pages: torch.Tensor

    def clear(self) -> None:
        super().clear()
        self.pending: list[torch.Tensor] = []
        self.pending_size = 0

    def available_size(self) -> int:
        return len(self.free_pages) + self.pending_size

    def alloc(self, need_size: int) -> torch.Tensor | None:
        if need_size > len(self.free_pages) and self.pending:
            self.free_pages = torch.cat((self.free_pages, *self.pending))
            self.pending, self.pending_size = [], 0
        return super().alloc(need_size)

    def free(self, free_index: torch.Tensor) -> None:
        if free_index.numel():
            self.pending.append(free_index.clone())
            self.pending_size += len(free_index)


_context_depth = 0


@contextmanager
def sglang_context() -> Iterator[None]:
    """SGLang's cache code reads its global configuration: publish a default one while it runs."""
    global _context_depth
    if _context_depth:
        yield
        return
    _context_depth += 1
    override = get_context().override_server_args(attention_backend="torch_native")
    override.install()
    try:
        yield
    finally:
        override.restore()
        _context_depth -= 1


def empty_originals(config: KeepKVConfig, slots: int, longest: int, scale: int, counters: Counters) -> Originals:
    """The server's archive with blocks that hold nothing: the pool has no layers. A block stands for 64 real tokens.
    longest: tokens of a request."""
    size = max(1, BLOCK_TOKENS // scale)
    layout = BlockLayout("native", 1, 1, 1, torch.float32)
    store = BlockStore(layout, 0, -(-int(config.host_ratio * slots) // size))
    store.block_tokens = size
    return Originals(store, [], [], counters, Staging(layout, longest) if config.streams_originals else None)
