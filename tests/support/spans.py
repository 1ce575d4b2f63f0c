"""Spans for the tests of the tree."""

from __future__ import annotations

from itertools import count
from typing import Any

from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

NO_ANCHOR = (None, 0)
_slot_ids = count()


def fresh_slots(m: int) -> list[int]:
    return [next(_slot_ids) for _ in range(m)]


def add(
    tree: SpanTree,
    tokens: Any,
    *,
    parent: Span | None = None,
    anchor: tuple[Any, int] = NO_ANCHOR,
    namespace: str = "a",
    m: int | None = None,
    raw: bool = False,
) -> Span:
    """Inserts a new span with fresh slots, by default half as many slots as tokens."""
    if parent is not None:
        anchor, namespace = (parent.anchor, parent.anchor_len), parent.namespace
    m = (len(tokens) if raw else (len(tokens) + 1) // 2) if m is None else m
    slots = fresh_slots(m)
    span, new = tree.insert(
        parent=parent,
        anchor=anchor[0],
        anchor_len=anchor[1],
        namespace=namespace,
        tokens=tokens,
        slots=slots,
        m=m,
        raw=raw,
    )
    assert new and span.slots is slots
    return span
