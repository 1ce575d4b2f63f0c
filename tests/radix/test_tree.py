"""What SpanTree finds and takes in, one behaviour per test. Every test ends with all invariants checked."""

from __future__ import annotations

from array import array
from itertools import product
from typing import Any

import numpy as np
import pytest

from keepkv_sglang.radix import children
from keepkv_sglang.radix.children import HEAD_TOKENS
from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.keyhash import KeyHash
from keepkv_sglang.radix.tree import SpanTree
from tests.support.spans import NO_ANCHOR, add

# -- matching ------------------------------------------------------------------------------------------------


def test_a_span_matches_whole_or_not_at_all(tree: SpanTree) -> None:
    span = add(tree, range(10))
    assert tree.match([NO_ANCHOR], "a", range(10)) is span
    assert tree.match([NO_ANCHOR], "a", range(20)) is span
    for shared in range(10):
        assert tree.match([NO_ANCHOR], "a", range(shared)) is None
        assert tree.match([NO_ANCHOR], "a", [*range(shared), 99, *range(shared + 1, 10)]) is None


def test_limit_cuts_the_key_not_the_span(tree: SpanTree) -> None:
    first = add(tree, range(10))
    second = add(tree, range(10, 20), parent=first)
    key = range(20)
    assert tree.match([NO_ANCHOR], "a", key, limit=20) is second
    assert tree.match([NO_ANCHOR], "a", key, limit=99) is second
    assert tree.match([NO_ANCHOR], "a", key, limit=19) is first
    assert tree.match([NO_ANCHOR], "a", key, limit=9) is None
    assert tree.match([NO_ANCHOR], "a", key, limit=0) is None
    assert tree.match([NO_ANCHOR], "a", key, limit=-1) is None


def test_a_chain_matches_as_far_as_its_spans_do(tree: SpanTree) -> None:
    chain = [add(tree, range(7), anchor=("sys", 3), m=2)]
    for start in (7, 14, 21):
        chain.append(add(tree, range(start, start + 7), parent=chain[-1], m=3))
    chain.append(add(tree, range(28, 30), parent=chain[-1], raw=True))
    key = [100, 101, 102, *range(30)]
    for length in range(len(key) + 1):
        whole = [span for span in chain if span.path_tokens <= length]
        assert tree.match([("sys", 3)], "a", key[:length]) is (whole[-1] if whole else None)
    last = chain[-1]
    assert (last.path_tokens, last.path_slots, last.offset) == (33, 3 + 2 + 3 * 3 + 2, 17)
    assert list(last.chain()) == chain[::-1] and last.path() == chain


def test_a_changed_continuation_matches_the_part_before_it(tree: SpanTree) -> None:
    first = add(tree, range(10))
    add(tree, range(10, 20), parent=first)
    assert tree.match([NO_ANCHOR], "a", [*range(15), 99, 16, 17, 18, 19]) is first


@pytest.mark.parametrize("short, long", [(3, 5), (31, 33), (32, 64), (40, 400), (5, 100)])
def test_the_longest_chain_wins_whichever_branch_it_is_on(tree: SpanTree, short: int, long: int) -> None:
    small = add(tree, range(short))
    big = add(tree, range(long))
    assert tree.match([NO_ANCHOR], "a", range(long + 20)) is big
    assert tree.match([NO_ANCHOR], "a", range(long - 1)) is small
    below_small = add(tree, range(short, long + 1), parent=small)
    assert tree.match([NO_ANCHOR], "a", range(long + 20)) is below_small
    below_big = add(tree, range(long, long + 2), parent=big)
    assert tree.match([NO_ANCHOR], "a", range(long + 20)) is below_big
    assert tree.match([NO_ANCHOR], "a", range(long + 1)) is below_small


def test_every_length_from_1_to_100_is_found(tree: SpanTree) -> None:
    """More than MANY_LENGTHS long ones, so also where numpy computes their hashes."""
    spans = {n: add(tree, range(n)) for n in range(100, 0, -1)}
    for n in range(1, 101):
        assert tree.match([NO_ANCHOR], "a", [*range(n), 999]) is spans[n]
    for n in range(2, 101, 3):
        tree.remove(spans[n])
    for n in range(2, 100, 3):
        assert tree.match([NO_ANCHOR], "a", range(n)) is spans[n - 1]
        assert tree.match([NO_ANCHOR], "a", range(n + 1)) is spans[n + 1]


def test_many_long_children_are_searched_below_a_parent_too(tree: SpanTree) -> None:
    parent = add(tree, range(50), anchor=("x", 7))
    spans = [add(tree, [*range(40), *range(n)], parent=parent) for n in range(1, 80)]
    key = [0] * 7 + [*range(50), *range(40), *range(100)]
    for limit in range(40, len(key) + 1, 7):
        best = tree.match([("x", 7)], "a", key, limit=limit)
        whole = [span for span in (parent, *spans) if span.path_tokens <= limit]
        assert best is (whole[-1] if whole else None)


def test_ties_go_to_the_larger_anchor_then_more_slots_then_the_elder(tree: SpanTree) -> None:
    anchors = [NO_ANCHOR, ("p4", 4), ("p8", 8)]
    whole = add(tree, range(20), m=10)
    assert tree.match(anchors, "a", range(20)) is whole
    first = add(tree, range(5), m=1)
    add(tree, range(5, 20), parent=first, m=9)
    assert tree.match(anchors, "a", range(20)) is whole  # both 20 tokens in 10 slots, whole is the elder
    half = add(tree, range(10), m=5)
    finer = add(tree, range(10, 20), parent=half, m=6)
    assert tree.match(anchors, "a", range(20)) is finer
    p8 = add(tree, range(8, 20), anchor=("p8", 8), m=1)
    p4 = add(tree, range(4, 20), anchor=("p4", 4), m=16)
    for order in (anchors, anchors[::-1]):
        assert tree.match(order, "a", range(20)) is p8
    assert tree.match(anchors[:2], "a", range(20)) is p4


def test_only_the_given_anchors_and_the_given_namespace_are_searched(tree: SpanTree) -> None:
    span = add(tree, [5, 6], anchor=(7, 3), namespace="a")
    other = add(tree, [5, 6], anchor=(7, 3), namespace="b")
    key = [1, 2, 3, 5, 6]
    assert tree.match([(7, 3)], "a", key) is span
    assert tree.match([(7, 3)], "b", key) is other
    assert tree.match([(7, 3)], "c", key) is None
    assert tree.match([(8, 3)], "a", key) is None
    assert tree.match([NO_ANCHOR], "a", key) is None
    assert tree.match([], "a", key) is None


def test_negative_and_64_bit_token_ids(tree: SpanTree) -> None:
    """SGLang pads multimodal input with hashes."""
    tokens = [-1, 2**63 - 1, -(2**63), 0, 7]
    span = add(tree, tokens)
    assert tree.match([NO_ANCHOR], "a", tokens) is span
    assert tree.match([NO_ANCHOR], "a", [1, *tokens[1:]]) is None


def test_the_callers_arrays_stay_the_callers(tree: SpanTree) -> None:
    tokens = array("q", range(300))
    span = add(tree, tokens)
    assert tree.match([NO_ANCHOR], "a", tokens) is span
    tokens.append(1)  # BufferError if a numpy view of it were still alive
    tokens[0] = 99
    assert tree.match([NO_ANCHOR], "a", range(300)) is span


# -- hashing -------------------------------------------------------------------------------------------------


def test_the_hash_of_a_substring_depends_on_its_tokens_only() -> None:
    piece = array("q", [3, -1, 2**40, 0, 0])
    for before, after in product((0, 1, 255, 256, 5000), (0, 1000)):
        key = KeyHash(array("q", [7] * before) + piece + array("q", [9] * after))
        assert key.of(before, len(piece)) == KeyHash(piece).of(0, len(piece))
    counts = np.array([5, 1, 300])
    key = KeyHash(array("q", [4] * 11) + piece + array("q", [9] * 1000))
    assert key.of_all(11, counts) == [key.of(11, n) for n in counts]
    base = KeyHash(array("q", [0, 1])).of(0, 2)
    assert KeyHash(piece).of(0, 5) == sum(token * base**i for i, token in enumerate(piece)) % 2**64


@pytest.mark.parametrize("constant_bits", [0, 1, 3])
def test_hash_collisions_never_show_another_span(
    tree: SpanTree, monkeypatch: pytest.MonkeyPatch, constant_bits: int
) -> None:
    """With 1, 2 or 8 hash values in all, every answer stays exact."""
    monkeypatch.setattr(children, "FEW", 0)
    true_hash = KeyHash.of
    monkeypatch.setattr(KeyHash, "of", lambda self, a, n: true_hash(self, a, n) & (2**constant_bits - 1))
    keys = [list(bits) for bits in product((0, 1), repeat=5)] + [[*range(HEAD_TOKENS + 8), x] for x in range(20)]
    spans = [add(tree, key) for key in keys]
    for key, span in zip(keys, spans, strict=True):
        assert tree.match([NO_ANCHOR], "a", key) is span
        assert tree.match([NO_ANCHOR], "a", [*key, 7]) is span
    assert tree.match([NO_ANCHOR], "a", [0, 0, 0, 0, 2]) is None
    assert tree.match([NO_ANCHOR], "a", [*range(HEAD_TOKENS + 8), 20]) is None
    for span in spans[::2]:
        tree.remove(span)
    for key, span in zip(keys, spans, strict=True):
        assert tree.match([NO_ANCHOR], "a", key) is (None if span.dead else span)
    check_tree(tree, slots_of=list)
    tree.reset()  # the fixture checks again, with the true hash


# -- inserting -----------------------------------------------------------------------------------------------


def test_the_same_tokens_again_return_the_first_span_and_take_no_slots(tree: SpanTree) -> None:
    first = add(tree, range(10), m=4)
    child = add(tree, range(10, 12), parent=first, raw=True)
    before = tree.evictable_slots
    for parent, tokens, m, live in ((None, range(10), 7, first), (first, range(10, 12), 1, child)):
        span, new = tree.insert(
            parent=parent, anchor=None, anchor_len=0, namespace="a", tokens=tokens, slots=["mine"], m=m
        )
        assert span is live and not new
    assert (len(tree), tree.evictable_slots, first.m, child.raw) == (2, before, 4, True)


def test_the_same_tokens_elsewhere_are_another_span(tree: SpanTree) -> None:
    top = add(tree, [1, 2])
    spans = [
        top,
        add(tree, [1, 2], parent=top),
        add(tree, [1, 2], namespace="b"),
        add(tree, [1, 2], anchor=(3, 9)),
    ]
    assert len(set(spans)) == len(tree) == 4


def test_a_removed_span_can_be_inserted_again(tree: SpanTree) -> None:
    old = add(tree, range(10))
    tree.remove(old)
    new = add(tree, range(10))
    assert new is not old and tree.match([NO_ANCHOR], "a", range(10)) is new


def test_what_cannot_be_a_span_is_refused(tree: SpanTree) -> None:
    live = add(tree, [1, 2], anchor=(5, 3))
    dead = add(tree, [3, 4], anchor=(5, 3))
    tree.remove(dead)
    good = {
        "parent": None,
        "anchor": 5,
        "anchor_len": 3,
        "namespace": "a",
        "tokens": [8, 9],
        "slots": [],
        "m": 1,
    }
    bad_ones: list[dict[str, Any]] = [
        {"tokens": []},
        {"m": 0},
        {"m": 3},
        {"raw": True},
        {"parent": dead},
        {"parent": live, "anchor": 6},
        {"parent": live, "namespace": "b"},
        {"anchor_len": 4},
        {"anchor": None},
        {"anchor": 6, "anchor_len": 0},
        {"anchor": 6, "anchor_len": -1},
    ]
    for bad in bad_ones:
        with pytest.raises(ValueError):
            tree.insert(**{**good, **bad})
        assert len(tree) == 1 and not tree.has_anchor(6) and not tree.has_anchor(None)
