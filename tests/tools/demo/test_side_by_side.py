"""Two answers beside each other."""

from __future__ import annotations

import pytest

from keepkv_sglang.tools.demo.side_by_side import columns, common_words, parting


def test_columns_are_wrapped_and_cut():
    left, right = "one two three four five six", "one"
    assert columns(left, right, width=9, lines=3) == "one two     one\nthree\nfour ..."
    assert columns("", "x", width=9) == "(nothing)   x"


@pytest.mark.parametrize(
    ("left", "right", "count", "says"),
    [
        ("a b\nc", "a  b c", None, "= the same answer, word for word"),
        ("a b c d e f g", "a b c d e x", 5, '≠ they part after 5 words, "... b c d e": "f g" | "x"'),
        ("a b", "a b c", 2, '≠ they part after 2 words, "... a b": "(the end)" | "c"'),
        ("a", "b", 0, '≠ they part from the first word: "a" | "b"'),
        ("", "b", 0, '≠ they part from the first word: "(the end)" | "b"'),
    ],
)
def test_where_they_part(left, right, count, says):
    assert common_words(left, right) == count and parting(left, right) == says
