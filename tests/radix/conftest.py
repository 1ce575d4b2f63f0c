"""The tree that the tests share: whatever a test does, all invariants are checked at its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from keepkv_sglang.radix.invariants import check_tree
from keepkv_sglang.radix.tree import SpanTree


@pytest.fixture
def tree() -> Iterator[SpanTree]:
    tree = SpanTree()
    yield tree
    check_tree(tree, slots_of=list)
