"""Selection scores by name. Each scorer is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from keepkv_sglang.scoring.base import Scorer

_SCORERS = ("snapkv", "keepkv", "keydiff")
QUERY_AGNOSTIC = frozenset({"keydiff"})
"""Scorers that read keys and votes only: for spans compressed while no request runs over them."""


def get_scorer(name: str) -> Scorer:
    """The scorer called `name`; ValueError for an unknown name."""
    if name not in _SCORERS:
        raise ValueError(f"unknown scorer {name!r}: use one of {', '.join(_SCORERS)}")
    return getattr(import_module(f"keepkv_sglang.scoring.{name}"), name)
