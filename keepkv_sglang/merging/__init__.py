"""Merge rules by name. One file per rule; each is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from keepkv_sglang.merging.base import MergeRule

RULES = ("evict", "mean", "zip", "tangent", "least_squares")
QUERY_FREE = frozenset({"evict", "mean"})
"""Rules that also work with a window of no queries."""


def get_rule(name: str) -> MergeRule:
    """The rule called `name`; ValueError for an unknown name."""
    if name not in RULES:
        raise ValueError(f"unknown merge rule {name!r}: use one of {', '.join(RULES)}")
    return getattr(import_module(f"keepkv_sglang.merging.{name}"), name)
