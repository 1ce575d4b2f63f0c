"""Selection scores by name, one file per method. Each is imported when it is first asked for."""

from __future__ import annotations

from keepkv_sglang.compress.registry import SCORERS
from keepkv_sglang.compress.window import Scorer

QUERY_AGNOSTIC = SCORERS.query_free
"""Scorers that read keys, values and votes only: for spans compressed while no request runs over them."""


def get_scorer(name: str) -> Scorer:
    """The scorer called `name` (registry.py: what a name can be); ValueError for an unknown name."""
    return SCORERS.get(name)
