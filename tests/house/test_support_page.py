"""docs/support.md and docs/security.md name tests that exist, and whatever is refused at start has a row."""

from __future__ import annotations

import ast
import re

import pytest

from keepkv_sglang.start import refuse
from keepkv_sglang.tools.places import REPO

PAGE = (REPO / "docs" / "support.md").read_text()
PROVEN, UNPROVEN = PAGE.split("## Never run")
ROWS = [line for line in PROVEN.splitlines() if line.startswith("| ") and not line.startswith(("| feature", "| what"))]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
NAMES = [rule[0] for rules in (refuse.FLAG_RULES, refuse.CPU_RULES, refuse.ENVIRONMENT_RULES, refuse.MODEL_RULES)
         for rule in rules]  # fmt: skip


def test_every_row_names_its_test():
    assert len(ROWS) > 60
    assert not [row for row in ROWS if not TEST.search(row.rstrip("| ").rsplit("|", 1)[1])]
    assert not TEST.search(UNPROVEN), "a feature with a test belongs to the tables above"


@pytest.mark.parametrize("page", ["support.md", "security.md"])
def test_the_tests_that_are_named_exist(page):
    named = TEST.findall((REPO / "docs" / page).read_text())
    assert len(named) > 15
    for path in {path for path, _ in named}:
        tree = ast.parse((REPO / path).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for where, name in named if where == path} <= defined, path


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_at_start_has_a_row(name):
    assert any(row.startswith(f"| `{name}`") for row in ROWS)
