"""Tables: what a Markdown reader needs, and that cells stay as they were given."""

from __future__ import annotations

import re

from keepkv_sglang.tools.report import tables

COLUMNS = "name", "share", "more"
ROWS = [("a", "0.10", 3), ("key x |v|", "12.50 [1, 2]", None)]


def cells(line: str) -> list[str]:
    """Of one line of a table, as GitHub splits it."""
    assert line.startswith("|") and line.endswith("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_keeps_every_cell_as_it_is():
    for padded in (True, False):
        head, rule, *body = tables.markdown(COLUMNS, ROWS, padded=padded).splitlines()
        assert cells(head) == list(COLUMNS)
        assert all(re.fullmatch(":?-{3,}:?", cell) for cell in cells(rule)) and len(cells(rule)) == len(COLUMNS)
        assert [cells(line) for line in body] == [["a", "0.10", "3"], ["key x |v|", "12.50 [1, 2]", ""]]
        assert (len({len(line) for line in (head, rule, *body)}) == 1) == padded


def test_text_is_aligned_left_and_numbers_right():
    head, rule, *_ = tables.markdown(COLUMNS, ROWS, text=(0,)).splitlines()
    assert [cell.endswith(":") for cell in cells(rule)] == [False, True, True] and head.startswith("| name  ")
    assert tables.markdown(COLUMNS, [("a", "1", "2"), ("b", "c", "d")], text=()).count("-:|") == 3


def test_a_line_break_stays_in_its_row_and_no_rows_are_a_table():
    assert len(tables.markdown(("a", "b"), [("x\ny", "1")]).splitlines()) == 3
    for padded in (True, False):
        assert len(tables.markdown(("a", "b"), [], padded=padded).splitlines()) == 2


def test_plain_columns_stand_below_each_other():
    head, _, first, second = tables.plain(COLUMNS, ROWS).splitlines()
    assert first.split() == ["a", "0.10", "3"] and "|v|" in second
    assert head.index("share") + len("share") == first.index("0.10") + len("0.10")
