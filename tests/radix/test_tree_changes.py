"""What SpanTree does to spans that are there: merge again, split, adopt, lock. One behaviour per test."""

from __future__ import annotations

import pytest

from keepkv_sglang.radix.tree import SpanTree
from tests.support.spans import NO_ANCHOR, add, fresh_slots

# -- merging again ---------------------------------------------------------------------------------------------


def test_a_merged_parent_keeps_its_children(tree: SpanTree) -> None:
    top = add(tree, range(10), anchor=("x", 3), raw=True)
    mid = add(tree, range(10, 14), parent=top, m=3)
    low = add(tree, range(14, 20), parent=mid, m=2)
    other = add(tree, range(50, 54), parent=top, m=1)
    old, before = top.slots, top.last_access
    new = fresh_slots(4)
    assert tree.replace(top, new, 4) is old
    assert (top.slots, top.m, top.raw, top.n, top.last_access) == (new, 4, False, 10, before)
    assert [span.path_slots for span in (top, mid, low, other)] == [7, 10, 12, 8]
    assert [span.path_tokens for span in (top, mid, low, other)] == [13, 17, 23, 17]
    assert (tree.evictable_slots, low.offset) == (4 + 3 + 2 + 1, 11)
    assert tree.match([("x", 3)], "a", [0, 0, 0, *range(20)]) is low


def test_what_cannot_be_merged_again(tree: SpanTree) -> None:
    top = add(tree, range(10), m=4)
    low = add(tree, range(10), parent=top)
    for m in (0, 4, 5, -1):
        with pytest.raises(ValueError):
            tree.replace(top, [], m)
    tree.lock(low)
    for span in (top, low):
        with pytest.raises(AssertionError):
            tree.replace(span, [], 1)
    tree.unlock(low)
    tree.remove(low)
    with pytest.raises(AssertionError):
        tree.replace(low, [], 1)
    assert top.m == 4 and len(top.slots) == 4


# -- splitting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 20, 31, 32, 33, 40, 79])
def test_a_raw_span_is_cut_in_two_and_the_lower_one_keeps_its_identity(tree: SpanTree, at: int) -> None:
    parent = add(tree, range(100, 110), anchor=("x", 2), m=5)
    span = add(tree, range(80), parent=parent, raw=True)
    child = add(tree, [7, 7], parent=span, m=1)
    key = [0, 0, *range(100, 110), *range(80)]
    assert tree.match([("x", 2)], "a", key) is span  # two hits
    serial, slots, ids = span.serial, span.slots, list(span.slots)
    pair = tree.split(span, at, slots[:at], slots[at:])
    assert pair is not None and pair[1] is span
    upper = pair[0]
    assert (span.serial, span.parent, upper.parent, child.parent) == (serial, upper, parent, span)
    assert upper.slots + span.slots == ids and upper.serial > serial
    assert (upper.n, upper.m, upper.raw, span.n, span.m, span.raw) == (at, at, True, 80 - at, 80 - at, True)
    assert (upper.created, upper.last_access, upper.hits) == (span.created, span.last_access, span.hits)
    assert (upper.path_tokens, upper.path_slots) == (12 + at, 7 + at)
    assert (span.path_tokens, span.path_slots, child.path_slots) == (92, 87, 88)
    assert tree.match([("x", 2)], "a", [*key, 7, 7]) is child
    assert tree.match([("x", 2)], "a", key) is span
    assert tree.match([("x", 2)], "a", key[:-1]) is upper
    assert tree.match([("x", 2)], "a", key[: 12 + at]) is upper
    assert tree.match([("x", 2)], "a", key[: 12 + at - 1]) is parent
    assert tree.evictable_slots == 5 + 80 + 1


def test_a_split_into_a_twin_changes_nothing(tree: SpanTree) -> None:
    twin = add(tree, range(4))
    span = add(tree, range(10), raw=True)
    slots = span.slots
    assert tree.split(span, 4, slots[:4], slots[4:]) is None
    assert (span.n, span.slots, span.parent, len(tree)) == (10, slots, None, 2)
    assert tree.match([NO_ANCHOR], "a", range(9)) is twin
    assert tree.split(span, 3, slots[:3], slots[3:]) is not None


def test_what_cannot_be_split(tree: SpanTree) -> None:
    merged, raw = add(tree, [1, 2, 3], m=2), add(tree, range(3), raw=True)
    for span, at in ((merged, 1), (raw, 0), (raw, 3), (raw, -1)):
        with pytest.raises(ValueError):
            tree.split(span, at, [], [])
    tree.lock(raw)
    with pytest.raises(AssertionError):
        tree.split(raw, 1, [], [])
    tree.unlock(raw)
    tree.remove(raw)
    with pytest.raises(AssertionError):
        tree.split(raw, 1, [], [])


# -- adopting --------------------------------------------------------------------------------------------------


def test_what_hung_below_a_merged_anchor_hangs_below_its_span(tree: SpanTree) -> None:
    top = add(tree, range(10, 20), anchor=("x", 10), m=4)
    low = add(tree, range(20, 24), parent=top, m=2)
    side = add(tree, range(30, 34), anchor=("x", 10), m=1)
    foreign = add(tree, range(10, 20), anchor=("x", 10), namespace="b")
    first = add(tree, range(2, 6), anchor=("w", 2), m=2)
    home = add(tree, range(6, 10), parent=first, m=1)
    tree.lock(home)
    assert tree.adopt("x", "a", home) == []
    assert {top.parent, side.parent} == {home} and low.parent is top
    assert {(span.anchor, span.anchor_len) for span in (top, low, side)} == {("w", 2)}
    assert [span.path_slots for span in (home, top, low, side)] == [5, 9, 11, 6]
    assert (low.path_tokens, tree.evictable_slots, tree.protected_slots) == (24, 4 + 2 + 1 + 5, 3)
    key = range(24)
    assert tree.match([("w", 2)], "a", key) is low
    assert tree.match([("x", 10)], "a", key) is None
    assert tree.match([("x", 10)], "b", key) is foreign
    tree.drop_anchor("x")
    assert not tree.has_anchor("x") and tree.adopt("x", "a", home) == []
    tree.unlock(home)


def test_an_adopted_twin_goes_and_the_one_already_there_stays(tree: SpanTree) -> None:
    top = add(tree, range(10, 50), anchor=("x", 10))
    low = add(tree, [1], parent=top)
    side = add(tree, [2], anchor=("x", 10))
    home = add(tree, range(10))
    stays = add(tree, range(10, 50), parent=home)
    slots = tree.evictable_slots
    assert tree.adopt("x", "a", home) == [low, top]
    assert top.dead and low.dead and side.parent is home and stays.parent is home
    assert tree.evictable_slots == slots - top.m - low.m
    assert tree.match([NO_ANCHOR], "a", [*range(50), 1]) is stays
    assert not tree.has_anchor("x")


def test_what_cannot_be_adopted(tree: SpanTree) -> None:
    top = add(tree, range(4), anchor=("x", 10))
    shorter, other = add(tree, range(9)), add(tree, range(10), namespace="b")
    for span in (shorter, other, top):
        with pytest.raises(ValueError):
            tree.adopt("x", "a", span)
    home = add(tree, range(10))
    tree.lock(top)
    with pytest.raises(AssertionError):
        tree.adopt("x", "a", home)
    assert top.parent is None and not home.children
    tree.unlock(top)
    tree.remove(home)
    with pytest.raises(AssertionError):
        tree.adopt("x", "a", home)


# -- locks ---------------------------------------------------------------------------------------------------


def test_a_lock_protects_the_chain_and_counts_each_slot_once(tree: SpanTree) -> None:
    top = add(tree, range(10), m=5)
    left = add(tree, range(10, 14), parent=top, m=3)
    right = add(tree, range(20, 24), parent=top, m=2)
    assert (tree.evictable_slots, tree.protected_slots) == (10, 0)
    tree.lock(left)
    assert (tree.evictable_slots, tree.protected_slots) == (2, 8)
    tree.lock(left)
    tree.lock(right)
    assert (tree.evictable_slots, tree.protected_slots, top.lock_ref, tree.oldest()) == (0, 10, 3, None)
    tree.unlock(left)
    assert (tree.evictable_slots, tree.protected_slots) == (0, 10)
    tree.unlock(left)
    assert (tree.evictable_slots, tree.protected_slots, tree.oldest()) == (3, 7, left)
    tree.unlock(right)
    assert (tree.evictable_slots, tree.protected_slots, top.lock_ref) == (10, 0, 0)


def test_a_child_of_a_locked_span_is_evictable_until_it_is_locked_itself(tree: SpanTree) -> None:
    top = add(tree, range(4))
    tree.lock(top)
    child = add(tree, range(4), parent=top)
    assert tree.oldest() is child
    tree.remove(child)
    assert tree.oldest() is None
    tree.unlock(top)
    assert tree.oldest() is top


def test_misuse_of_locks_is_caught_and_changes_nothing(tree: SpanTree) -> None:
    top = add(tree, range(4))
    child = add(tree, range(4), parent=top)
    tree.lock(top)
    with pytest.raises(AssertionError):
        tree.unlock(child)
    for misuse in (tree.remove, tree.drop_subtree):
        with pytest.raises(AssertionError):
            misuse(top)
    with pytest.raises(AssertionError):
        tree.drop_anchor(None)
    assert len(tree) == 2
    tree.unlock(top)
    with pytest.raises(AssertionError):
        tree.remove(top)  # still has a child
    tree.remove(child)
    for misuse in (tree.lock, tree.unlock, tree.remove, tree.drop_subtree):
        with pytest.raises(AssertionError):
            misuse(child)
