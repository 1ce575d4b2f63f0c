"""Which span SpanTree gives up next, and what its invariants notice. One behaviour per test."""

from __future__ import annotations

import pytest

from keepkv_sglang.radix import children
from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.order import Usage
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree
from tests.support.spans import NO_ANCHOR, add

# -- eviction ------------------------------------------------------------------------------------------------


def evict_all(tree: SpanTree) -> list[Span]:
    order = []
    while (span := tree.oldest()) is not None:
        tree.remove(span)
        order.append(span)
        check_tree(tree)
    return order


def test_eviction_takes_the_least_recently_used_leaf_first(tree: SpanTree) -> None:
    a = add(tree, [1, 1])
    b = add(tree, [2, 2])
    a1 = add(tree, [3], parent=a)
    a2 = add(tree, [4], parent=a)
    c = add(tree, [5, 5])
    assert tree.match([NO_ANCHOR], "a", [1, 1, 3]) is a1  # a and a1 become the youngest
    assert evict_all(tree) == [b, a2, c, a1, a]
    assert (len(tree), tree.evictable_slots, tree.has_anchor(None)) == (0, 0, False)


def test_a_match_without_touch_leaves_the_order_and_the_clock_alone(tree: SpanTree) -> None:
    a, b = add(tree, [1, 1]), add(tree, [2, 2])
    now = tree.tick()
    assert tree.match([NO_ANCHOR], "a", [1, 1], touch=False) is a
    assert tree.match([NO_ANCHOR], "a", [9], touch=True) is None
    assert tree.tick() == now + 1
    assert evict_all(tree) == [a, b]


def test_a_duplicate_insert_counts_as_use(tree: SpanTree) -> None:
    a, b = add(tree, [1, 1]), add(tree, [2, 2])
    tree.insert(parent=None, anchor=None, anchor_len=0, namespace="a", tokens=[1, 1], slots=None, m=1)
    assert evict_all(tree) == [b, a]


def test_a_span_locked_when_it_was_oldest_comes_back_in_its_old_place(tree: SpanTree) -> None:
    a, b = add(tree, [1, 1]), add(tree, [2, 2])
    tree.lock(a)
    assert tree.oldest() is b
    tree.unlock(a)
    assert tree.oldest() is a and tree.oldest() is a  # a peek


def test_dead_spans_never_match_and_leave_no_trace(tree: SpanTree) -> None:
    a = add(tree, range(40), anchor=("x", 1))
    b = add(tree, range(40), parent=a)
    assert tree.has_anchor("x")
    tree.remove(b)
    assert a.children is not None and not (a.children._short or a.children._long)  # no empty level stays behind
    assert b.dead and tree.match([("x", 1)], "a", [0, *range(40), *range(40)]) is a
    tree.remove(a)
    assert tree.match([("x", 1)], "a", [0, *range(40)]) is None
    assert not tree.has_anchor("x") and list(tree.spans()) == []
    add(tree, [1], anchor=("x", 2))  # the id is free again, so it may have another length


def test_drop_subtree_and_drop_anchor_return_children_first(tree: SpanTree) -> None:
    top = add(tree, [1, 1], anchor=("x", 1))
    mid = add(tree, [2, 2], parent=top)
    low, side = add(tree, [3, 3], parent=mid), add(tree, [4, 4], parent=mid)
    other = add(tree, [1, 1], anchor=("x", 1), namespace="b")
    kept = add(tree, [1, 1], anchor=("y", 1))
    dropped = tree.drop_subtree(mid)
    assert set(dropped[:2]) == {low, side} and dropped[2:] == [mid]
    assert len(tree) == 3 and tree.match([("x", 1)], "a", [0, 1, 1, 2, 2]) is top
    leaf = add(tree, [5, 5], parent=top)
    dropped = tree.drop_anchor("x")
    assert set(dropped) == {top, leaf, other} and dropped.index(leaf) < dropped.index(top)
    assert all(span.dead for span in dropped) and list(tree.spans()) == [kept]
    assert not tree.has_anchor("x") and tree.drop_anchor("x") == []


def test_reset_kills_everything_and_time_goes_on(tree: SpanTree) -> None:
    top = add(tree, [1, 1])
    low = add(tree, [2, 2], parent=top)
    tree.lock(top)
    now = tree.tick()
    tree.reset()
    assert top.dead and low.dead and tree.oldest() is None and tree.tick() > now
    assert (len(tree), tree.evictable_slots, tree.protected_slots, tree.has_anchor(None)) == (0, 0, 0, False)
    assert tree.match([NO_ANCHOR], "a", [1, 1]) is None


def test_the_heap_stays_bounded_when_spans_go_another_way(tree: SpanTree) -> None:
    for i in range(2000):
        add(tree, [i], anchor=(i, 1))
        tree.drop_anchor(i)
    assert len(tree._heap.entries) <= 66


# -- eviction orders ---------------------------------------------------------------------------------------------


def three(tree: SpanTree) -> list[Span]:
    """Inserted as a, b, c; a was found three times, c once, b never; the last find was a's."""
    spans = [add(tree, [i, i]) for i in range(3)]
    for i in (0, 0, 2, 0):
        assert tree.match([NO_ANCHOR], "a", [i, i]) is spans[i]
    return spans


@pytest.mark.parametrize(
    "policy_and_order",
    ["lru bca", "LRU bca", "priority bca", "tlru bca", "mru acb", "fifo abc", "filo cba", "lfu bca", "slru bca"],
)
def test_every_policy_of_sglang_has_an_order(policy_and_order: str) -> None:
    policy, order = policy_and_order.split()
    tree = SpanTree(policy)
    spans = three(tree)
    assert evict_all(tree) == [spans["abc".index(name)] for name in order]


def test_frequency_and_segments_differ_from_recency() -> None:
    """a: three hits, used long ago; b: two hits; c: new."""
    orders = {}
    for policy in ("lru", "lfu", "slru"):
        tree = SpanTree(policy)
        a, b = add(tree, [0, 0]), add(tree, [1, 1])
        for key in ([0, 0], [0, 0], [1, 1]):
            tree.match([NO_ANCHOR], "a", key)
        c = add(tree, [2, 2])
        assert [span.hits for span in (a, b, c)] == [3, 2, 1]
        orders[policy] = ["abc"[(a, b, c).index(span)] for span in evict_all(tree)]
    assert orders == {"lru": ["a", "b", "c"], "lfu": ["c", "b", "a"], "slru": ["c", "a", "b"]}


def test_hits_count_as_in_sglang(tree: SpanTree) -> None:
    """Once for the request that inserts, once for each that finds; a repeated look of the same request asks not to."""
    top = add(tree, [1, 1])
    low = add(tree, [2, 2], parent=top)
    assert (top.hits, low.hits) == (1, 1)
    assert tree.match([NO_ANCHOR], "a", [1, 1, 2, 2]) is low
    assert (top.hits, low.hits) == (2, 2)
    assert tree.match([NO_ANCHOR], "a", [1, 1, 2, 2], touch=False) is low
    before = low.last_access
    tree.touch(low)
    assert (top.hits, low.hits) == (2, 2) and low.last_access > before
    tree.insert(parent=top, anchor=None, anchor_len=0, namespace="a", tokens=[2, 2], slots=None, m=1)
    assert (top.hits, low.hits) == (2, 3)


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "mru", "filo"])
def test_the_key_of_something_that_is_no_span_compares(policy: str) -> None:
    tree = SpanTree(policy)
    spans = three(tree)
    for span in spans:
        usage = Usage(created=span.created, last_access=span.last_access, hits=span.hits)
        assert tree.key(usage) == tree.key(span)
    assert [tree.key(span) for span in evict_all(tree)] == sorted(tree.key(span) for span in spans)


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'random'.*lru, lfu, fifo, slru, mru, filo, priority, tlru"):
        SpanTree("random")


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "mru", "filo"])
def test_a_busy_span_leaves_a_bounded_heap(policy: str) -> None:
    tree = SpanTree(policy)
    for i in range(10):
        add(tree, [i])
    for i in range(1000):
        tree.match([NO_ANCHOR], "a", [i % 10])
    assert len(tree._heap.entries) <= 2 * 10 + 64
    check_tree(tree)


@pytest.mark.parametrize("policy", ["lru", "mru"])
def test_a_span_that_inherits_takes_the_place_of_what_it_stands_for(policy: str) -> None:
    tree = SpanTree(policy)
    a, b, c = (add(tree, [i, i]) for i in range(3))
    tree.tick()
    tree.inherit(b, Usage(created=1, last_access=1, hits=7))
    assert (b.created, b.last_access, b.hits) == (1, 1, 7)
    tree.remove(a)
    assert evict_all(tree) == ([b, c] if policy == "lru" else [c, b])


# -- the invariants themselves -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["I1", "I2", "I3", "I4", "I5", "I6", "I7"])
def test_each_invariant_notices_its_damage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "FEW", 0)  # a few are compared with what they have seen, so that has no index
    tree = SpanTree()
    top = add(tree, range(40))
    low = add(tree, range(40, 50), parent=top)
    tree.lock(low)
    tree.unlock(low)
    check_tree(tree, slots_of=list)
    if name == "I1":
        tree.evictable_slots += 1
    elif name == "I2":
        tree.evictable_slots -= low.m  # the counters agree: only the chain is wrong
        tree.protected_slots += low.m
        low.lock_ref += 1
    elif name == "I3":
        low.slots[0] = top.slots[0]
    elif name == "I4":
        low.parent = None
    elif name == "I5":
        low.path_slots += 1
    elif name == "I6":
        tree._heap.entries.clear()
    elif name == "I7":
        low.data = bytes(8) + low.data[8:]
    with pytest.raises(AssertionError, match=f"^{name}: "):
        check_tree(tree, slots_of=list)
