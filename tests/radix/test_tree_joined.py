"""Raw spans that short turns were joined to: one span, found up to each of its borders as a chain would have been."""

from __future__ import annotations

from typing import Any

import pytest

from keepkv_sglang.radix.span import JOINED_TOKENS, Span
from keepkv_sglang.radix.tree import SpanTree
from tests.support.spans import NO_ANCHOR, add, fresh_slots


def join(tree: SpanTree, span: Span, tokens: Any) -> bool:
    return tree.join(span, tokens, [*span.slots, *fresh_slots(len(tokens))])


@pytest.fixture
def cuts(tree: SpanTree) -> list[tuple[Span, Span]]:
    made: list[tuple[Span, Span]] = []
    tree._on_split = lambda upper, lower: made.append((upper, lower))
    return made


def found(tree: SpanTree, tokens: Any) -> int:
    span = tree.match([NO_ANCHOR], "a", tokens)
    return span.path_tokens if span is not None else 0


def test_thousands_of_turns_of_one_token_are_a_short_chain_with_all_their_ends(tree: SpanTree) -> None:
    text = [n * 7919 % 1009 for n in range(3000)]
    span, depth = add(tree, text[:2], raw=True), 1
    for at in range(2, 3000, 2):
        tree.lock(span)
        if tree.can_join(span, 2):
            assert join(tree, span, text[at : at + 2])
            tree.unlock(span)
        else:
            tree.unlock(span)
            span, depth = add(tree, text[at : at + 2], parent=span, raw=True), depth + 1
    assert len(tree) == depth == -(-3000 // JOINED_TOKENS)
    assert (span.path_tokens, span.path_slots, tree.evictable_slots) == (3000, 3000, 3000)
    for at in (2, 4, 62, 64, 66, 1502, 2998):
        assert found(tree, [*text[:at], -1]) == found(tree, text[: at + 1]) == at
    assert found(tree, text) == 3000


def test_a_key_that_parts_behind_a_border_cuts_there(tree: SpanTree, cuts: list[tuple[Span, Span]]) -> None:
    top = add(tree, range(50), m=9)
    span = add(tree, range(50, 53), parent=top, raw=True)
    assert join(tree, span, [53, 54]) and join(tree, span, [55])
    assert (span.n, span.m, span.borders, span.path_tokens, span.path_slots) == (6, 6, [3, 5], 56, 15)
    slots, hits = span.slots, span.hits
    assert found(tree, range(56)) == 56 and found(tree, range(52)) == 50 and not cuts
    assert found(tree, [*range(54), -1]) == 53
    [(upper, lower)] = cuts
    assert lower is span and upper.parent is top and lower.parent is upper
    assert (upper.slots, lower.slots, upper.borders, lower.borders) == (slots[:3], slots[3:], [], [2])
    assert (upper.hits, lower.hits) == (hits + 2, hits + 1), "the second match was the upper one's alone"
    assert [found(tree, range(n)) for n in range(50, 58)] == [50, 50, 50, 53, 53, 55, 56, 56]


def test_a_whole_span_wins_over_an_equally_long_part(tree: SpanTree, cuts: list[tuple[Span, Span]]) -> None:
    span = add(tree, [1], raw=True)
    assert join(tree, span, [2]) and join(tree, span, [3])
    first = add(tree, [1, 2, 9], m=1)
    top = add(tree, [1, 2, 3, 9], m=1)
    whole = add(tree, [2], parent=add(tree, [1, 7]), raw=True)
    assert found(tree, [1, 2, 9]) == 3 and found(tree, [1, 2, 3, 9]) == 4 and found(tree, [1, 7, 2]) == 3
    assert not cuts and first.hits == top.hits == whole.hits == 2
    assert found(tree, [1, 2, 5]) == 2 and len(cuts) == 1


def test_what_is_inserted_up_to_a_border_is_there_already(tree: SpanTree, cuts: list[tuple[Span, Span]]) -> None:
    span = add(tree, [1, 2], raw=True)
    assert join(tree, span, [3, 4])
    tree.lock(span)  # whoever holds it does not keep it from being cut
    again, new = tree.insert(
        parent=None, anchor=None, anchor_len=0, namespace="a", tokens=[1, 2], slots=[], m=2, raw=True
    )
    assert not new and cuts == [(again, span)] and again.lock_ref == span.lock_ref == 1
    assert (tree.protected_slots, tree.evictable_slots) == (4, 0)
    tree.unlock(span)
    assert (again.lock_ref, tree.evictable_slots, tree.oldest()) == (0, 4, span)


def test_where_a_span_of_its_own_is_needed(tree: SpanTree) -> None:
    top = tree.insert(
        parent=None, anchor=None, anchor_len=0, namespace="a", tokens=[1, 2, 3], slots=fresh_slots(1), m=1,
        lookahead=[4, 5],
    )[0]  # fmt: skip
    left = add(tree, [4, 5], parent=top, raw=True)
    raw = add(tree, [8], raw=True)
    assert not tree.can_join(top, 1), "not raw"
    assert not tree.can_join(left, 1), "what a compression left raw is its own"
    assert tree.can_join(raw, JOINED_TOKENS - 1) and not tree.can_join(raw, JOINED_TOKENS)
    tree.lock(raw)
    assert tree.can_join(raw, 1), "the caller's lock"
    tree.lock(raw)
    assert not tree.can_join(raw, 1), "another request's row ends there"
    with pytest.raises(AssertionError):
        tree.join(raw, [9], fresh_slots(2))
    tree.unlock(raw)
    tree.unlock(raw)
    child = add(tree, [9], parent=raw, raw=True)
    assert not tree.can_join(raw, 1) and tree.can_join(child, 1)


def test_no_two_spans_end_at_the_same_place(tree: SpanTree) -> None:
    first, second = add(tree, [1], raw=True), add(tree, [1, 2], raw=True)
    slots, taken = first.slots, tree.evictable_slots
    assert not join(tree, first, [2]), "the span that is there"
    assert join(tree, second, [3])
    assert not join(tree, first, [2]), "a border of another"
    assert (first.n, first.slots, first.borders, tree.evictable_slots) == (1, slots, [], taken + 1)
    assert join(tree, first, [2, 4])


def test_a_split_keeps_borders_and_a_merge_forgets_them(tree: SpanTree, cuts: list[tuple[Span, Span]]) -> None:
    span = add(tree, [1, 2], raw=True)
    for token in range(3, 9):
        assert join(tree, span, [token])
    parts = tree.split(span, 5, span.slots[:5], span.slots[5:])
    assert parts is not None and [part.borders for part in parts] == [[2, 3, 4], [1, 2]]
    tree.replace(parts[1], fresh_slots(1), 1)
    tree.replace(parts[0], fresh_slots(2), 2)
    assert parts[0].borders == parts[1].borders == [] and not cuts
    assert [found(tree, range(1, n + 1)) for n in range(9)] == [0, 0, 0, 0, 0, 5, 5, 5, 8], "merged spans are atomic"


def test_joined_spans_below_a_merged_anchor_are_cut(tree: SpanTree, cuts: list[tuple[Span, Span]]) -> None:
    top = add(tree, [1], anchor=("x", 10), raw=True)
    assert join(tree, top, [2]) and join(tree, top, [3])
    home = add(tree, range(100, 110))
    child = add(tree, [1, 2], parent=home, raw=True)
    assert join(tree, child, [9])
    removed = tree.adopt("x", "a", home)
    assert len(cuts) == 3 and removed == [], "1, 1 2, 1 2 9 and 1, 2, 3 end at different places or are chains"
    assert [found(tree, [*range(100, 110), *tail]) for tail in ([1], [1, 2], [1, 2, 9], [1, 2, 3])] == [11, 12, 13, 13]


def test_a_joined_span_is_as_old_as_its_youngest_part_and_keeps_its_hits(tree: SpanTree) -> None:
    span = add(tree, [1], raw=True)
    assert found(tree, [1]) == 1
    other = add(tree, [5], raw=True)
    assert join(tree, span, [2])
    assert span.created == span.last_access == tree.now and span.hits == 2
    assert tree.oldest() is other
