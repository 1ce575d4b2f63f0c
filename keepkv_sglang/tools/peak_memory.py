"""How much more memory a piece of work holds at most than the process did before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Peak:
    """bytes: of resident memory, beyond what was held when the work began; 0 until it has ended."""

    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """`with peak_memory() as peak: work()`, then peak.bytes. Linux: the kernel's own high-water mark is reset.

    Memory of earlier work that the allocator gives away again, without asking the kernel, does not count; what it gives
    back to the kernel meanwhile counts as less. So measure in a process that has not done much before.
    """
    peak = Peak()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield peak
    peak.bytes = max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
