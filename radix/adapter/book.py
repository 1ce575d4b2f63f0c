"""What is kept about a cache's spans beside their tree."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

from keepkv_sglang.radix.adapter.events import SpanEvents
from keepkv_sglang.radix.marks import marked, plain
from keepkv_sglang.radix.span import Span


class SpanBook:
    """How many spans each configuration has, which raw spans may be merged under pressure, and KV events.

    raw: by serial, oldest first; forgotten lazily. pressure_key(): as Requests has it.
    """

    def __init__(self, events: SpanEvents | None, pressure_key: Callable[[], str | None]) -> None:
        self.events = events
        self.raw: dict[int, Span] = {}
        self._pressure_key = pressure_key
        self._configurations: Counter[Any] = Counter()

    def configurations(self) -> set[str]:
        """Fingerprints of settings that spans have."""
        return set(self._configurations)

    def added(self, span: Span, prompt: array[int], mergeable: bool) -> None:
        """prompt: all tokens up to its end. mergeable: it is raw, and not a part of what a compression left raw."""
        self._configurations[_configuration(span)] += 1
        if mergeable:
            self._note_raw(span)
        if self.events is not None:
            self.events.stored(span, plain(prompt), *span.namespace[:2])  # type: ignore[index]

    def joined(self, span: Span, n: int) -> None:
        """The last n tokens of a raw span were appended to it."""
        self._note_raw(span)
        if self.events is not None:
            self.events.joined(span, n)

    def cut(self, upper: Span, lower: Span) -> None:
        """A raw span is two now."""
        self._configurations[_configuration(upper)] += 1
        if lower.serial in self.raw:
            self.raw[upper.serial] = upper
        if self.events is not None:
            self.events.split(upper, lower)

    def removed(self, span: Span) -> None:
        """It is gone."""
        self.raw.pop(span.serial, None)
        configuration = _configuration(span)
        self._configurations[configuration] -= 1
        if not self._configurations[configuration]:
            del self._configurations[configuration]
        if self.events is not None:
            self.events.removed(span)

    def _note_raw(self, span: Span) -> None:
        if _configuration(span) == self._pressure_key() and not marked(span.tokens):
            self.raw[span.serial] = span


def _configuration(span: Span) -> Any:
    return span.namespace[-1]  # type: ignore[index]
