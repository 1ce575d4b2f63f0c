"""Calls and seconds of a simulated server's operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Calls and seconds by operation. Only the outermost of nested calls of one operation counts."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._open: set[str] = set()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.calls[name] = self.calls.get(name, 0)
        self.seconds[name] = self.seconds.get(name, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if name in self._open:
                return function(*args, **kwargs)
            self._open.add(name)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1
                self._open.discard(name)

        return timed

    def microseconds(self) -> dict[str, float]:
        return {name: 1e6 * self.seconds[name] / self.calls[name] for name in self.calls if self.calls[name]}
