"""Random operations on SpanTree against a dictionary that does everything by brute force.

The dictionary is tree_model.py's; here are the operations, each on both.
KEEPKV_SOAK=1: support/machines.py.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keepkv_sglang.radix import children
from keepkv_sglang.radix.children import HEAD_TOKENS
from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.keyhash import KeyHash
from keepkv_sglang.radix.order import Usage
from keepkv_sglang.radix.span import JOINED_TOKENS
from tests.support.machines import case
from tests.support.tree_model import ANCHORS, NAMESPACES, ORDERS, PICK, SHORT, TOKENS, Entry, Key, TreeModel


class TreeMachine(TreeModel, RuleBasedStateMachine):
    """One rule per operation; after each the tree must equal the model and keep I1 to I7."""

    # -- the rules ---------------------------------------------------------------------------------------

    def insert(self, parent: Key | None, key: Key, m: int, raw: bool) -> None:
        anchor, namespace, path = key
        tokens = path[-1]
        m = len(tokens) if raw else min(m, len(tokens))
        joined = self.joined(key)
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
        assert self.settle() == ([joined] if joined is not None else [])
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
        below = [other for other in self.model if (other[0], len(ANCHORS[other[0]])) in anchors]
        hits = [
            part
            for other in below
            if other[1] == namespace
            for part in self.parts(other)
            if key[: len(self.text_of(part))] == self.text_of(part)
        ]
        heads = {
            part[0][1]: None
            for other in below
            if len(other[2]) == 1
            for part in self.parts(other)
            if text[: len(ANCHORS[other[0]]) + HEAD_TOKENS][: len(self.text_of(part))]
            == self.text_of(part)[: len(ANCHORS[other[0]]) + HEAD_TOKENS]
        }
        known = self.tree.namespaces(anchors, "all", text, 9)
        assert len(known) == len(heads) and heads.keys() == set(known)
        assert self.tree.namespaces(anchors, "others", text, 9) == []
        assert len(self.tree.namespaces(anchors, "all", text, 1)) <= 1
        found = self.tree.match(anchors, namespace, text, limit=limit, touch=touch)
        if not hits:
            assert found is None and not self.cuts
            return
        part = max(hits, key=self.rank)
        rank = self.rank(part)
        assert self.settle() == ([part] if part[1] else [])
        assert found is not None
        best = found.meta
        assert (found.path_tokens, found.path_slots) == (rank[0], rank[2])
        assert found is self.model[best].span and self.text(best) == key[: rank[0]]
        assert part[1] or best == part[0]
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
        entry.m, entry.raw, entry.borders = 1 + m % (old_m - 1), False, []
        assert self.tree.replace(entry.span, self.fresh_slots(entry.m), entry.m) is old
        assert len(old) == old_m

    @precondition(lambda self: any(entry.raw for entry in self.model.values()))
    @rule(index=PICK, tokens=TOKENS)
    def join(self, index: int, tokens: tuple[int, ...]) -> None:
        key = self.pick([key for key, entry in self.model.items() if entry.raw], index)
        entry, old = self.model[key], key[2][-1]
        can = len(self.below(key)) == 1 and entry.locks <= 1 and len(old) + len(tokens) <= JOINED_TOKENS
        assert self.tree.can_join(entry.span, len(tokens)) == can
        if not can:
            return
        new = (*key[:2], (*key[2][:-1], old + tokens))
        slots = [*entry.span.slots, *self.fresh_slots(len(tokens))]
        done = self.tree.join(entry.span, tokens, slots)
        assert done == (new not in self.model and self.joined(new) is None)
        if not done:
            return
        self.rename(key, new)
        entry.borders.append(len(old))
        entry.m, entry.created = len(slots), self.clock + 1
        self.use(new, hit=False)

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
        if upper_key in self.model or self.joined(upper_key) not in (None, (key, at)):
            assert pair is None
            return
        assert pair is not None
        upper, lower = pair
        assert lower is entry.span and upper.meta is None
        self.cut(upper, lower, at)

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
        parts = [part for key in [*tops, *(key for key in self.below(home) if key[2][:-1] == home[2])]
                 for part in self.parts(key)[1:]]  # fmt: skip
        removed = self.tree.adopt(anchor, namespace, self.model[home].span)
        assert len(self.settle()) == (len(parts) if tops else 0)
        tops = [key for key in self.model if key[:2] == (anchor, namespace) and len(key[2]) == 1]
        new_keys = {top: (*home[:2], home[2] + top[2]) for top in tops}
        twins = [top for top, new in new_keys.items() if new in self.model]
        gone = [key for twin in twins for key in self.below(twin)]
        self.forget(gone, removed)
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
            assert span.borders == entry.borders and tuple(span.tokens) == span.meta[2][-1]
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


class IndexedTreeMachine(TreeMachine):
    """The same where children are found by their index from so many on."""

    FEW = 1

    def __init__(self) -> None:
        super().__init__()
        self.few, children.FEW = children.FEW, self.FEW

    def teardown(self) -> None:
        children.FEW = self.few


class CollidingTreeMachine(IndexedTreeMachine):
    """The same with two hash values in all: nothing may depend on hashes being distinct."""

    FEW = 0

    def __init__(self) -> None:
        super().__init__()
        self.true_hash = true_hash = KeyHash.of
        KeyHash.of = lambda key, start, n: true_hash(key, start, n) & 1  # type: ignore[method-assign]

    def teardown(self) -> None:
        super().teardown()
        KeyHash.of = self.true_hash  # type: ignore[method-assign]


def ordered_by(policy: str) -> Any:
    return case(type(f"{policy.capitalize()}TreeMachine", (TreeMachine,), {"policy": policy}), 20)


TestTree = case(TreeMachine, 100)
TestIndexedTree = case(IndexedTreeMachine, 60)
TestCollidingTree = case(CollidingTreeMachine, 60)
TestLfuTree = ordered_by("lfu")
TestFifoTree = ordered_by("fifo")
TestSlruTree = ordered_by("slru")
TestMruTree = ordered_by("mru")
TestFiloTree = ordered_by("filo")
