"""Two parts of SGLang that the simulator has in its own way: the allocator, and the global configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.runtime_context import get_context


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
