"""What a SpanTree must do, by brute force: a dictionary of every span by its place and tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from hypothesis import strategies as st

from keepkv_sglang.radix.children import HEAD_TOKENS
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

# Anchors by their content. Few tokens and few lengths, so that branches overlap all the time; the long runs
# are there to cross HEAD_TOKENS.
ANCHORS: dict[Any, tuple[int, ...]] = {None: (), "p": (0,), "pq": (0, 0, 1), "r": (1,)}
LONG = st.sampled_from([(0,) * (HEAD_TOKENS + d) for d in (-1, 0, 1, 9)])
SHORT = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
TOKENS = st.one_of(SHORT, SHORT, LONG, st.builds(tuple.__add__, LONG, SHORT))
NAMESPACES = st.sampled_from(["a", "b"])
PICK = st.integers(0, 10**6)

# The orders once more, in the model's words.
ORDERS: dict[str, Callable[[Entry], Any]] = {
    "lru": lambda entry: entry.used,
    "mru": lambda entry: -entry.used,
    "fifo": lambda entry: entry.created,
    "filo": lambda entry: -entry.created,
    "lfu": lambda entry: (entry.hits, entry.used),
    "slru": lambda entry: (min(entry.hits, 2), entry.used),
}

Key = tuple[Any, str, tuple[tuple[int, ...], ...]]  # anchor, namespace, the chain's tokens from the top
Part = tuple[Key, int]  # a span, or its first so many tokens: up to a border


@dataclass
class Entry:
    """What the model knows of one span."""

    span: Span
    m: int
    raw: bool
    created: int
    used: int
    hits: int = 1
    locks: int = 0
    borders: list[int] = field(default_factory=list)  # of a joined span


class TreeModel:
    """The tree, what is known of it, and how one follows from the other."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.tree = SpanTree(self.policy, group_of=lambda namespace: "all", on_split=self.was_cut)
        self.model: dict[Key, Entry] = {}
        self.held: list[Key] = []  # one element per lock not yet undone
        self.clock = 0
        self.slot_ids = count()
        self.cuts: list[tuple[Span, Span, int]] = []  # what the tree cut by itself, not yet in the model

    def chain(self, key: Key) -> list[Key]:
        anchor, namespace, path = key
        return [(anchor, namespace, path[:depth]) for depth in range(len(path), 0, -1)]

    def below(self, key: Key) -> list[Key]:
        depth = len(key[2])
        return [other for other in self.model if other[:2] == key[:2] and other[2][:depth] == key[2]]

    def free_leaves(self) -> list[Key]:
        return [key for key, entry in self.model.items() if not entry.locks and len(self.below(key)) == 1]

    def text(self, key: Key) -> tuple[int, ...]:
        return sum(key[2], ANCHORS[key[0]])

    def rank(self, part: Part) -> tuple[int, int, int, bool, int]:
        key, at = part
        slots = sum(self.model[link].m for link in self.chain(key))
        anchor_len, less = len(ANCHORS[key[0]]), len(key[2][-1]) - at if at else 0
        tokens = len(self.text(key)) - less
        return tokens, anchor_len, anchor_len + slots - less, not at, -self.model[key].span.serial

    def parts(self, key: Key) -> list[Part]:
        """What a key can end with: the span, and its part before each border."""
        return [(key, 0), *((key, at) for at in self.model[key].borders)]

    def text_of(self, part: Part) -> tuple[int, ...]:
        key, at = part
        return sum((*key[2][:-1], key[2][-1][:at] if at else key[2][-1]), ANCHORS[key[0]])

    def joined(self, key: Key) -> Part | None:
        """A joined span with a border where a span with this key would end."""
        for other, entry in self.model.items():
            if (*other[:2], other[2][:-1]) == (*key[:2], key[2][:-1]):
                for at in entry.borders:
                    if other[2][-1][:at] == key[2][-1]:
                        return other, at
        return None

    def was_cut(self, upper: Span, lower: Span) -> None:
        self.cuts.append((upper, lower, upper.n))

    def settle(self) -> list[Part]:
        """The model follows the tree's own cuts; returns what was cut, as parts."""
        done = []
        for upper, lower, at in self.cuts:
            assert upper.meta is None and at in self.model[lower.meta].borders
            done.append((lower.meta, at))
            self.cut(upper, lower, at)
        self.cuts.clear()
        return done

    def cut(self, upper: Span, lower: Span, at: int) -> Key:
        key, entry = lower.meta, self.model[lower.meta]
        tokens = key[2][-1]
        upper.meta = upper_key = (*key[:2], (*key[2][:-1], tokens[:at]))
        self.rename(key, (*upper_key[:2], (*upper_key[2], tokens[at:])))
        borders = entry.borders
        self.model[upper_key] = replace(entry, span=upper, m=at, borders=[b for b in borders if b < at])
        entry.borders = [b - at for b in borders if b > at]
        entry.m -= at
        return upper_key

    def use(self, key: Key, hit: bool) -> None:
        self.clock += 1
        for link in self.chain(key):
            self.model[link].used = self.clock
            self.model[link].hits += hit

    def rename(self, key: Key, new: Key) -> None:
        """A span hangs elsewhere now, and all below it."""
        for old in self.below(key):
            renamed = (*new[:2], new[2] + old[2][len(key[2]) :])
            self.model[renamed] = entry = self.model.pop(old)
            entry.span.meta = renamed
            self.held = [renamed if held == old else held for held in self.held]

    def fresh_slots(self, m: int) -> list[int]:
        return [next(self.slot_ids) for _ in range(m)]

    def pick(self, keys: list[Key], index: int) -> Key:
        return keys[index % len(keys)]

    def forget(self, keys: list[Key], removed: list[Span]) -> None:
        """The tree must have removed exactly these, each after its children, and marked them dead."""
        assert {span.serial for span in removed} == {self.model[key].span.serial for key in keys}
        assert len(removed) == len(keys) and all(span.dead for span in removed)
        order = {span.serial: place for place, span in enumerate(removed)}
        for span in removed:
            if span.parent is not None and span.parent.serial in order:
                assert order[span.serial] < order[span.parent.serial]
        for key in keys:
            del self.model[key]
