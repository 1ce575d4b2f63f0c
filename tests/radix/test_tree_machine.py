"""Random operations on SpanTree against a dictionary that does everything by brute force.

Over 400 lines, since a state machine of hypothesis is one class: its model and every rule that is checked against it.
KEEPKV_SOAK=1 runs 2,000 longer examples of each machine instead of 100 (fewer for what is not plain lru).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.order import Usage
from keepkv_sglang.radix.span import HEAD_TOKENS, KeyHash, Span
from keepkv_sglang.radix.tree import SpanTree

SOAK = os.environ.get("KEEPKV_SOAK") == "1"


def at_most(examples: int) -> settings:
    return settings(
        max_examples=2000 if SOAK else examples,
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


class TreeMachine(RuleBasedStateMachine):
    """One rule per operation; after each the tree must equal the model and keep I1 to I7."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.tree = SpanTree(self.policy)
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
        return len(self.text(key)), anchor_len, anchor_len + slots, -self.model[key].span.serial

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

    # -- the rules ---------------------------------------------------------------------------------------

    def insert(self, parent: Key | None, key: Key, m: int, raw: bool) -> None:
        anchor, namespace, path = key
        tokens = path[-1]
        m = len(tokens) if raw else min(m, len(tokens))
        span, new = self.tree.insert(
            parent=self.model[parent].span if parent else None,
            anchor=anchor,
            anchor_len=len(ANCHORS[anchor]),
            namespace=namespace,
            tokens=tokens,
            slots=self.fresh_slots(m),
            m=m,
            raw=raw,
            meta=key,
        )
        assert new == (key not in self.model)
        if new:
            self.model[key] = Entry(span, m, raw, created=self.clock + 1, used=0)
        else:
            self.model[key].hits += 1
        assert span is self.model[key].span
        self.use(key, hit=False)

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
            self.use(best, hit=True)

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

    @precondition(lambda self: self.model)
    @rule(index=PICK, hit=st.booleans())
    def touch(self, index: int, hit: bool) -> None:
        key = self.pick(list(self.model), index)
        self.tree.touch(self.model[key].span, hit)
        self.use(key, hit)

    @precondition(lambda self: self.model)
    @rule(index=PICK, created=PICK, used=PICK, hits=st.integers(1, 4))
    def inherit(self, index: int, created: int, used: int, hits: int) -> None:
        entry = self.model[self.pick(list(self.model), index)]
        entry.used, entry.hits = used % (self.clock + 1), hits
        entry.created = created % (entry.used + 1)
        usage = Usage(created=entry.created, last_access=entry.used, hits=entry.hits)
        self.tree.inherit(entry.span, usage)

    @precondition(lambda self: any(not entry.locks and entry.m > 1 for entry in self.model.values()))
    @rule(index=PICK, m=PICK)
    def compress(self, index: int, m: int) -> None:
        key = self.pick([key for key, entry in self.model.items() if not entry.locks and entry.m > 1], index)
        entry = self.model[key]
        old, old_m = entry.span.slots, entry.m
        entry.m, entry.raw = 1 + m % (old_m - 1), False
        assert self.tree.replace(entry.span, self.fresh_slots(entry.m), entry.m) is old
        assert len(old) == old_m

    def splittable(self) -> list[Key]:
        return [key for key, entry in self.model.items() if entry.raw and not entry.locks and entry.m > 1]

    @precondition(lambda self: self.splittable())
    @rule(index=PICK, at=PICK)
    def split(self, index: int, at: int) -> None:
        key = self.pick(self.splittable(), index)
        entry, tokens = self.model[key], key[2][-1]
        at = 1 + at % (len(tokens) - 1)
        slots = entry.span.slots
        pair = self.tree.split(entry.span, at, slots[:at], slots[at:])
        upper_key = (*key[:2], (*key[2][:-1], tokens[:at]))
        if upper_key in self.model:
            assert pair is None
            return
        assert pair is not None
        upper, lower = pair
        assert lower is entry.span and upper.meta is None
        upper.meta = upper_key
        self.rename(key, (*upper_key[:2], (*upper_key[2], tokens[at:])))
        self.model[upper_key] = replace(entry, span=upper, m=at)
        entry.m -= at

    @rule(anchor=st.sampled_from(["p", "pq", "r"]), namespace=NAMESPACES, index=PICK, m=PICK, twin=st.booleans())
    def adopt(self, anchor: Any, namespace: str, index: int, m: int, twin: bool) -> None:
        content = ANCHORS[anchor]
        self.insert(None, (None, namespace, (content,)), 1 + m % len(content), False)
        same = [key for key in self.model if key[1] == namespace and self.text(key) == content]
        home = self.pick(same, index)
        tops = [key for key in self.model if key[:2] == (anchor, namespace) and len(key[2]) == 1]
        if twin and tops:
            again = (*home[:2], home[2] + self.pick(tops, index)[2])
            self.insert(home, again, 1, False)
        if any(self.model[top].locks for top in tops):
            try:
                self.tree.adopt(anchor, namespace, self.model[home].span)
            except AssertionError:
                return  # and the invariants see that nothing has moved
            raise AssertionError("adopted a locked span")
        new_keys = {top: (*home[:2], home[2] + top[2]) for top in tops}
        twins = [top for top, new in new_keys.items() if new in self.model]
        gone = [key for twin in twins for key in self.below(twin)]
        self.forget(gone, self.tree.adopt(anchor, namespace, self.model[home].span))
        for top, new in new_keys.items():
            if top not in twins:
                self.rename(top, new)

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
    def flush(self) -> None:
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
            span = entry.span
            assert (span.lock_ref, span.m, span.raw) == (entry.locks, entry.m, entry.raw)
            assert (span.created, span.last_access, span.hits) == (entry.created, entry.used, entry.hits)
        assert self.tree.evictable_slots == sum(entry.m for entry in self.model.values() if not entry.locks)
        assert self.tree.protected_slots == sum(entry.m for entry in self.model.values() if entry.locks)
        for anchor in ANCHORS:
            assert self.tree.has_anchor(anchor) == any(key[0] == anchor for key in self.model)

    @invariant()
    def oldest_is_the_models(self) -> None:
        order = ORDERS[self.policy]
        leaves = [self.model[key] for key in self.free_leaves()]
        expected = min(leaves, key=lambda entry: (order(entry), entry.span.serial), default=None)
        assert self.tree.oldest() is (expected.span if expected else None)


class CollidingTreeMachine(TreeMachine):
    """The same with two hash values in all: nothing may depend on hashes being distinct."""

    def __init__(self) -> None:
        super().__init__()
        self.true_hash = true_hash = KeyHash.of
        KeyHash.of = lambda key, start, n: true_hash(key, start, n) & 1  # type: ignore[method-assign]

    def teardown(self) -> None:
        KeyHash.of = self.true_hash  # type: ignore[method-assign]


def case(machine: type[TreeMachine], examples: int) -> Any:
    test_case = machine.TestCase
    test_case.settings = at_most(examples)
    return test_case


def ordered_by(policy: str) -> Any:
    return case(type(f"{policy.capitalize()}TreeMachine", (TreeMachine,), {"policy": policy}), 20)


TestTree = case(TreeMachine, 100)
TestCollidingTree = case(CollidingTreeMachine, 60)
TestLfuTree = ordered_by("lfu")
TestFifoTree = ordered_by("fifo")
TestSlruTree = ordered_by("slru")
TestMruTree = ordered_by("mru")
TestFiloTree = ordered_by("filo")
