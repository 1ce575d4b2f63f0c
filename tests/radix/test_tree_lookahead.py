"""Spans that tokens behind them had a say in: only a prompt that goes on with the same tokens sees them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv_sglang.radix.children import HEAD_TOKENS
from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.span import Span
from keepkv_sglang.radix.tree import SpanTree

ROOT = [(None, 0)]


def add(tree: SpanTree, tokens: Any, lookahead: Any = (), parent: Span | None = None, raw: bool = False) -> Span:
    m = len(tokens) if raw else 1
    place = {"anchor": None, "anchor_len": 0, "namespace": "a", "slots": [object() for _ in range(m)]}
    return tree.insert(parent=parent, tokens=tokens, m=m, raw=raw, lookahead=lookahead, **place)[0]


def match(tree: SpanTree, text: Any, limit: int | None = None) -> Span | None:
    return tree.match(ROOT, "a", text, limit)


@pytest.mark.parametrize("n", [5, HEAD_TOKENS - 2, HEAD_TOKENS, 100])
def test_the_key_includes_what_follows(n: int):
    tree, own = SpanTree(), [*range(n)]
    one, other = add(tree, own, [7, 8, 9]), add(tree, own, [7, 8, 1])
    alone = add(tree, own)
    assert len({one, other, alone}) == 3 and add(tree, own, [7, 8, 9]) is one
    assert [match(tree, own + end) for end in ([7, 8, 9], [7, 8, 1, 4], [7, 8], [], [3])] == [
        one, other, alone, alone, alone,
    ]  # fmt: skip
    assert match(tree, [*own, 7, 8, 9], limit=n + 2) is alone, "a prompt that ends inside it has not seen it all"
    assert match(tree, [*own[:-1], 7, 8, 9]) is None
    assert (one.n, one.lookahead, one.path_tokens, one.path_slots) == (n, 3, n, 1)
    check_tree(tree, lambda slots: slots)
    tree.remove(alone)
    assert match(tree, own) is None and match(tree, [*own, 7, 8]) is None
    assert match(tree, [*own, 7, 8, 9]) is one
    check_tree(tree, lambda slots: slots)


def test_what_hangs_below_follows_it():
    tree = SpanTree()
    top = add(tree, [1, 2, 3], [4, 5])
    tail = add(tree, [4, 5], parent=top, raw=True)
    deep = add(tree, [4], [5, 6], parent=top)
    assert match(tree, [1, 2, 3, 4, 5]) is tail
    assert match(tree, [1, 2, 3, 4, 5, 6]) is tail, "longer than the one that saw more"
    tree.remove(tail)
    assert match(tree, [1, 2, 3, 4, 5, 6]) is deep and match(tree, [1, 2, 3, 4, 5, 7]) is top
    check_tree(tree, lambda slots: slots)
    with pytest.raises(ValueError, match="chosen for"):
        add(tree, [4, 6], parent=top)
    with pytest.raises(ValueError, match="raw"):
        add(tree, [9], [1], raw=True)


PIECES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4)
TEXT = st.lists(st.integers(0, 1), min_size=24, max_size=24)


@settings(max_examples=200, deadline=None)
@given(inserted=st.lists(st.tuples(TEXT, PIECES), max_size=6), asked=TEXT, end=st.integers(0, 24))
def test_match_is_the_longest_chain_whose_every_span_saw_the_prompt(inserted, asked, end):
    tree, chains = SpanTree(), {}
    for text, pieces in inserted:
        at, parent = 0, None
        for n, lookahead in pieces:
            parent = add(tree, text[at : at + n], text[at + n : at + n + lookahead], parent)
            if parent.n != n:
                break  # the twin that is there took fewer or more of the same tokens for its own
            at += n
            seen = [len(link.seen) + link.path_tokens - link.n for link in parent.chain()]
            chains[parent] = text[: max(seen)]
    check_tree(tree, lambda slots: slots)
    found = match(tree, asked, end)
    lengths = [span.path_tokens for span, text in chains.items() if len(text) <= end and asked[: len(text)] == text]
    assert (found.path_tokens if found else 0) == max(lengths, default=0)
    assert found is None or asked[: len(chains[found])] == chains[found]
