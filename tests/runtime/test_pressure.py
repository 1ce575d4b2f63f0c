"""When a cold prefix is merged: the rules, and the book of what SGLang's tree holds."""

from __future__ import annotations

from array import array

import pytest

from keepkv_sglang.radix.nodes import NodeBook
from keepkv_sglang.radix.order import Usage
from keepkv_sglang.radix.tree import SpanTree
from keepkv_sglang.runtime.pressure import is_cold, piece_of, worth_merging

SCOPE = (None, None, None)


def test_merging_must_be_cheaper_than_the_recomputation_it_is_expected_to_save():
    # 2,000 tokens to 400: 640,000 pairs at 10 flops against half of 2,000 x 6,400 flops: exactly the same
    assert worth_merging(2000, 400, 0, 10.0, 6400.0)
    assert not worth_merging(2000, 400, 0, 10.0, 6399.0)
    assert worth_merging(2000, 400, 2, 10.0, 4800.0 / 0.75 * (2 / 3) + 1)  # asked for again: 3/4 instead of 1/2
    assert not worth_merging(64, 64, 9, 0.0, 1.0), "nothing is saved"
    longest = max(n for n in range(100, 100_000, 100) if worth_merging(n, n // 5, 0, 10.0, 6400.0))
    assert longest == 2000, "the cost grows with n squared: long prefixes are cut or left alone"


def test_cold_is_older_than_twice_the_mean_age():
    tree = SpanTree()
    for n in range(4):  # used at 1, 2, 3, 4
        tree.insert(parent=None, anchor=None, anchor_len=0, namespace="", tokens=[n], slots=None, m=1)
    for _ in range(6):
        tree.tick()
    assert tree.now == 10 and tree.mean_age == 7.5
    assert not is_cold(tree, -5) and is_cold(tree, -6)
    tree.reset()
    assert is_cold(tree, 9), "nothing compressed: every prefix is cold"


def test_a_split_keeps_the_lower_nodes_id_and_both_their_tokens():
    book, text = NodeBook(), array("q", range(100, 120))
    book.touch([(1, 0, 8), (2, 8, 20)], text, SCOPE, now=3)
    book.split(2, 8, 15, upper_id=7)
    assert book.get(2).own(15).tolist() == list(range(115, 120))
    assert book.get(7).own(8).tolist() == list(range(108, 115))
    assert book.get(7).usage == Usage(created=3, last_access=3)
    # SGLang split node 1 by itself and a request was seen on the path only now
    book.touch([(9, 0, 3), (1, 3, 8)], text, SCOPE, now=4)
    assert book.get(9).own(0).tolist() == [100, 101, 102] and book.get(1).own(3).tolist() == list(range(103, 108))


def test_coldest_gives_every_node_once_by_age_until_it_is_used_or_unlocked():
    book, text = NodeBook(), array("q", range(40))
    for now, node_id in enumerate((5, 3, 4), start=1):
        book.touch([(node_id, 0, 10)], text, SCOPE, now)
    book.touch([(5, 0, 10)], text, SCOPE, now=4)
    assert [book.coldest()[0] for _ in range(3)] == [3, 4, 5] and book.coldest() is None
    book.put_back(4)
    book.put_back(4)
    assert book.coldest()[0] == 4 and book.coldest() is None
    book.lock(3)
    book.lock(3)
    book.unlock(3)
    assert book.locked(3) and book.coldest() is None
    book.unlock(3)
    assert not book.locked(3) and book.coldest()[0] == 3
    book.put_back(5)
    book.forget(5)
    assert book.coldest() is None and book.get(5) is None
    with pytest.raises(AssertionError, match="without lock"):
        book.unlock(3)


def test_a_piece_fits_the_budget_and_leaves_no_stump():
    assert piece_of(100, 100, 64) == 100
    assert piece_of(500, 200, 64) == 200
    assert piece_of(230, 200, 64) == 166, "64 stay"
    assert piece_of(100, 70, 64) == 0, "in a step with more budget, whole"
    assert piece_of(128, 70, 64) == 64


def test_nodes_that_sglang_split_by_itself_are_learned_from_the_part_below():
    book, text = NodeBook(), array("q", range(100, 150))
    book.touch([(1, 0, 10), (2, 10, 50)], text, SCOPE, now=3)
    path = [(1, 0, 10), (8, 10, 22), (9, 22, 30), (2, 30, 50)]  # node 2 was cut twice
    assert book.complete(path)
    assert book.get(8).own(10) == text[10:22] and book.get(9).own(22) == text[22:30]
    assert book.get(9).usage == Usage(created=3, last_access=3) and book.get(9).usage is not book.get(2).usage
    assert sorted(book.coldest()[0] for _ in range(4)) == [1, 2, 8, 9]
    assert not book.complete([(1, 0, 10), (5, 10, 20), (6, 20, 30)]), "nothing known below: not merged"
    book.forget(1)
    assert not book.complete([(1, 0, 10), (8, 10, 22)])
