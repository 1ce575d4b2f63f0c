"""Random operations on SpanTree against a dictionary that does everything by brute force.

KEEPKV_SOAK=1 runs 2,000 longer examples instead of 100.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import count
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.span import HEAD_TOKENS, KeyHash, Span
from keepkv_sglang.radix.tree import SpanTree

SOAK = os.environ.get("KEEPKV_SOAK") == "1"
SETTINGS = settings(
    max_examples=2000 if SOAK else 100,
    stateful_step_count=80 if SOAK else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# Anchors by their content. Few tokens and few lengths, so that branches overlap all the time; the long runs
# are there to cross HEAD_TOKENS.
ANCHORS: dict[Any, tuple[int, ...]] = {None: (), "p": (0,), "pq": (0, 0, 1), "r": (1,)}
LONG = st.sampled_from([(0,) * (HEAD_TOKENS + d) for d in (-1, 0, 1, 9)])
SHORT = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
TOKENS = st.one_of(SHORT, SHORT, LONG, st.builds(tuple.__add__, LONG, SHORT))
NAMESPACES = st.sampled_from(["a", "b"])
PICK = st.integers(0, 10**6)

Key = tuple[Any, str, tuple[tuple[int, ...], ...]]  # anchor, namespace, the chain's tokens from the top


@dataclass
class Entry:
    """What the model knows of one span."""

    span: Span
    m: int
    born: int
    used: int
    locks: int = 0


class TreeMachine(RuleBasedStateMachine):
    """One rule per operation; after each the tree must equal the model and keep I1 to I7."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = SpanTree()
        self.model: dict[Key, Entry] = {}
        self.held: list[Key] = []  # one element per lock not yet undone
        self.clock = 0
        self.slot_ids = count()

    # -- the model ---------------------------------------------------------------------------------------

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

    def rank(self, key: Key) -> tuple[int, int, int, int]:
        slots = sum(self.model[link].m for link in self.chain(key))
        anchor_len = len(ANCHORS[key[0]])
        return len(self.text(key)), anchor_len, anchor_len + slots, -self.model[key].born

    def use(self, key: Key) -> None:
        self.clock += 1
        for link in self.chain(key):
            self.model[link].used = self.clock

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

    # -- the rules ---------------------------------------------------------------------------------------

    def insert(self, parent: Key | None, key: Key, m: int, raw: bool) -> None:
        anchor, namespace, path = key
        tokens = path[-1]
        m = len(tokens) if raw else min(m, len(tokens))
        slots = [next(self.slot_ids) for _ in range(m)]
        span, new = self.tree.insert(
            parent=self.model[parent].span if parent else None,
            anchor=anchor,
            anchor_len=len(ANCHORS[anchor]),
            namespace=namespace,
            tokens=tokens,
            slots=slots,
            m=m,
            raw=raw,
            meta=key,
        )
        assert new == (key not in self.model)
        if new:
            self.model[key] = Entry(span, m, born=span.serial, used=0)
        assert span is self.model[key].span
        self.use(key)

    @initialize(anchor=st.sampled_from(list(ANCHORS)), tokens=TOKENS)
    def start(self, anchor: Any, tokens: tuple[int, ...]) -> None:
        self.insert(None, (anchor, "a", (tokens,)), 1, False)

    @rule(anchor=st.sampled_from(list(ANCHORS)), namespace=NAMESPACES, tokens=TOKENS, m=PICK, raw=st.booleans())
    def insert_top(self, anchor: Any, namespace: str, tokens: tuple[int, ...], m: int, raw: bool) -> None:
        self.insert(None, (anchor, namespace, (tokens,)), 1 + m % len(tokens), raw)

    @precondition(lambda self: self.model)
    @rule(index=PICK, tokens=TOKENS, m=PICK, raw=st.booleans())
    def insert_below(self, index: int, tokens: tuple[int, ...], m: int, raw: bool) -> None:
        parent = self.pick(list(self.model), index)
        self.insert(parent, (*parent[:2], (*parent[2], tokens)), 1 + m % len(tokens), raw)

    def match(self, namespace: str, text: tuple[int, ...], limit: int | None, touch: bool) -> None:
        anchors = [(a, len(content)) for a, content in ANCHORS.items() if text[: len(content)] == content]
        key = text if limit is None else text[: max(limit, 0)]
        hits = [
            other
            for other in self.model
            if (other[0], len(ANCHORS[other[0]])) in anchors
            and other[1] == namespace
            and key[: len(self.text(other))] == self.text(other)
        ]
        found = self.tree.match(anchors, namespace, text, limit=limit, touch=touch)
        if not hits:
            assert found is None
            return
        best = max(hits, key=self.rank)
        assert found is self.model[best].span
        assert (found.path_tokens, found.path_slots) == (len(self.text(best)), self.rank(best)[2])
        if touch:
            self.use(best)

    @rule(namespace=NAMESPACES, pieces=st.lists(TOKENS, max_size=5), limit=st.none() | st.integers(0, 80))
    def match_anything(self, namespace: str, pieces: list[tuple[int, ...]], limit: int | None) -> None:
        self.match(namespace, sum(pieces, ()), limit, touch=True)

    @precondition(lambda self: self.model)
    @rule(index=PICK, more=SHORT, cut=st.integers(0, 3), touch=st.booleans())
    def match_something_there(self, index: int, more: tuple[int, ...], cut: int, touch: bool) -> None:
        key = self.pick(list(self.model), index)
        text = self.text(key)
        self.match(key[1], text[: len(text) - cut] + more, None, touch)
        self.match(key[1], text + more, len(text) - cut, touch)

    @precondition(lambda self: self.model)
    @rule(index=PICK)
    def lock(self, index: int) -> None:
        key = self.pick(list(self.model), index)
        self.tree.lock(self.model[key].span)
        self.held.append(key)
        for link in self.chain(key):
            self.model[link].locks += 1

    @precondition(lambda self: self.held)
    @rule(index=PICK)
    def unlock(self, index: int) -> None:
        key = self.held.pop(index % len(self.held))
        self.tree.unlock(self.model[key].span)
        for link in self.chain(key):
            self.model[link].locks -= 1

    @precondition(lambda self: self.free_leaves())
    @rule(steps=st.integers(1, 6))
    def remove_oldest(self, steps: int) -> None:
        for _ in range(steps):
            self.oldest_is_the_models()
            span = self.tree.oldest()
            if span is None:
                return
            self.tree.remove(span)
            self.forget([span.meta], [span])

    @precondition(lambda self: self.free_leaves())
    @rule(index=PICK)
    def remove_any_leaf(self, index: int) -> None:
        key = self.pick(self.free_leaves(), index)
        span = self.model[key].span
        self.tree.remove(span)
        self.forget([key], [span])

    @precondition(lambda self: any(not entry.locks for entry in self.model.values()))
    @rule(index=PICK)
    def drop_subtree(self, index: int) -> None:
        key = self.pick([key for key, entry in self.model.items() if not entry.locks], index)
        keys = self.below(key)
        self.forget(keys, self.tree.drop_subtree(self.model[key].span))

    @rule(anchor=st.sampled_from(list(ANCHORS)))
    def drop_anchor(self, anchor: Any) -> None:
        keys = [key for key in self.model if key[0] == anchor]
        if any(self.model[key].locks for key in keys):
            try:
                self.tree.drop_anchor(anchor)
            except AssertionError:
                return  # and the invariants see that nothing has gone
            raise AssertionError("dropped an anchor with locked spans")
        self.forget(keys, self.tree.drop_anchor(anchor))

    @precondition(lambda self: len(self.model) > 5)
    @rule()
    def reset(self) -> None:
        spans = [entry.span for entry in self.model.values()]
        self.tree.reset()
        assert all(span.dead for span in spans)
        self.model.clear()
        self.held.clear()

    @rule()
    def tick(self) -> None:
        self.clock += 1
        assert self.tree.tick() == self.clock

    # -- after every rule --------------------------------------------------------------------------------

    @invariant()
    def invariants_hold(self) -> None:
        check_tree(self.tree, slots_of=list)

    @invariant()
    def tree_equals_model(self) -> None:
        live = {span.meta: span for span in self.tree.spans()}
        assert live == {key: entry.span for key, entry in self.model.items()}
        assert len(self.tree) == len(self.model)
        for entry in self.model.values():
            assert (entry.span.lock_ref, entry.span.last_access) == (entry.locks, entry.used)
        assert self.tree.evictable_slots == sum(entry.m for entry in self.model.values() if not entry.locks)
        assert self.tree.protected_slots == sum(entry.m for entry in self.model.values() if entry.locks)
        for anchor in ANCHORS:
            assert self.tree.has_anchor(anchor) == any(key[0] == anchor for key in self.model)

    @invariant()
    def oldest_is_the_models(self) -> None:
        leaves = self.free_leaves()
        expected = min(leaves, key=lambda key: self.model[key].used, default=None)
        oldest = self.tree.oldest()
        assert oldest is (self.model[expected].span if expected else None)


class CollidingTreeMachine(TreeMachine):
    """The same with two hash values in all: nothing may depend on hashes being distinct."""

    def __init__(self) -> None:
        super().__init__()
        self.true_hash = true_hash = KeyHash.of
        KeyHash.of = lambda key, start, n: true_hash(key, start, n) & 1  # type: ignore[method-assign]

    def teardown(self) -> None:
        KeyHash.of = self.true_hash  # type: ignore[method-assign]


TestTree = TreeMachine.TestCase
TestTree.settings = SETTINGS
TestCollidingTree = CollidingTreeMachine.TestCase
TestCollidingTree.settings = SETTINGS
