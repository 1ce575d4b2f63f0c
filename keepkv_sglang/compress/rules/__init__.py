"""Merge rules by name. One file per rule; each is imported when it is first asked for."""

from __future__ import annotations

from keepkv_sglang.compress.registry import MERGE_RULES
from keepkv_sglang.compress.rules.base import MergeRule

RULES = MERGE_RULES.names
QUERY_FREE = MERGE_RULES.query_free
"""Rules that also work with a window of no queries."""


def get_rule(name: str) -> MergeRule:
    """The rule called `name` (registry.py: what a name can be); ValueError for an unknown name."""
    return MERGE_RULES.get(name)
