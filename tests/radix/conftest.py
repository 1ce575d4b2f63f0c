"""The tree that the tests share: whatever a test does, all invariants are checked at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.tree import SpanTree

sys.path.insert(0, str(Path(__file__).parent))  # spans.py, under --import-mode=importlib


@pytest.fixture
def tree() -> Iterator[SpanTree]:
    tree = SpanTree()
    yield tree
    check_tree(tree, slots_of=list)
