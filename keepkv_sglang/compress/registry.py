"""Scorers, merge rules and sharings of heads by name: built in, of an installed package, or by dotted path.

    snapkv                   a name of SCORERS.names: function `snapkv` of keepkv_sglang/compress/scorers/snapkv.py
    mine                     entry point `mine = "package.module:function"` of the group keepkv_sglang.scorers
    package.module:function  any function that can be imported; by flag only, since it imports code

Nothing is imported before it is asked for, and not torch either. What is not built in is tried once on eight tokens
before it is used, so that a policy with another signature or shape stops the start and not a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any


@dataclass(frozen=True)
class Registry:
    """One kind of policy. `names`: the built-in ones, of which those in `query_free` work without window queries.

    package: holds one module per built-in, with a function of the same name. group: the entry-point group. trial:
    "module:function" that calls a policy on eight tokens and raises ValueError when its result cannot be used.
    A policy of somebody else's works without queries if it has an attribute `needs_queries = False`.
    """

    kind: str
    names: tuple[str, ...]
    query_free: frozenset[str]
    package: str
    group: str
    trial: str

    def get(self, name: str) -> Callable[..., Any]:
        """The policy called `name`; ValueError, with what to use instead, for one that does not exist or work."""
        return _get(self, name)

    def needs_queries(self, name: str) -> bool:
        """True when the policy reads the window's queries."""
        if name in self.names:
            return name not in self.query_free
        return bool(getattr(self.get(name), "needs_queries", True))

    def known(self) -> tuple[str, ...]:
        """What a server can run: built-in names, then those of installed packages."""
        names = (*self.names, *(name for name in _entry_points(self.group) if name not in self.names))
        return tuple(name for name in names if name not in OFFLINE_SCORERS)


SCORERS = Registry(
    "scorer",
    (
        "snapkv",
        "rms",
        "window_references",
        "keepkv",
        "keydiff",
        "knorm",
        "tova",
        "gkv",
        "value_norm",
        "expected_attention",
        "expected_attention_full",
        "streaming_llm",
        "h2o",
    ),
    frozenset({"keydiff", "knorm", "streaming_llm"}),
    "keepkv_sglang.compress.scorers",
    "keepkv_sglang.scorers",
    "keepkv_sglang.compress.scorers.trial:try_scorer",
)
MERGE_RULES = Registry(
    "merge rule",
    ("least_squares", "tangent", "zip", "mean", "value_refit", "attention_matching", "evict"),
    frozenset({"mean", "evict"}),
    "keepkv_sglang.compress.rules",
    "keepkv_sglang.merge_rules",
    "keepkv_sglang.compress.rules.trial:try_rule",
)
HEADS = Registry(
    "sharing of heads",
    ("uniform", "layer", "all"),
    frozenset({"uniform", "layer", "all"}),
    "keepkv_sglang.compress.heads",
    "keepkv_sglang.heads",
    "keepkv_sglang.compress.heads.trial:try_sharing",
)
INCOMPARABLE_SCORERS = frozenset({"keydiff", "knorm", "value_norm", "streaming_llm"})
"""Their scores say nothing about how much a head needs: its heads keep the same number of tokens. The others' are parts
of the attention that the head gives away. A scorer of somebody else's may have an attribute `comparable = False`."""
OFFLINE_SCORERS = frozenset({"h2o", "expected_attention_full"})
"""They need the attention of every query; a server keeps the last ones only."""


def is_path(name: str) -> bool:
    """True for "package.module:function", which must not come from a client."""
    return ":" in name


def check(registry: Registry, name: Any) -> str:
    """`name` if a server can run it; ValueError otherwise. Imports and tries what is not built in."""
    if not isinstance(name, str):
        raise ValueError(f"a {registry.kind} is a name, not a {type(name).__name__}; {_hint(registry)}")
    if name in OFFLINE_SCORERS:
        raise ValueError(f"scorer {name!r} needs the attention of every query of the span, and a server keeps the last "
                         f"ones only; {_hint(registry)}")  # fmt: skip
    if name not in registry.names:
        registry.get(name)
    return name


def _hint(registry: Registry) -> str:
    return f"use one of {', '.join(registry.known())}, or a path package.module:function"


@lru_cache(maxsize=64)
def _get(registry: Registry, name: str) -> Callable[..., Any]:
    if name in registry.names:
        return getattr(import_module(f"{registry.package}.{name}"), name)
    if is_path(name):
        policy = _imported(registry, name)
    elif name in _entry_points(registry.group):
        policy = _imported(registry, name, _entry_points(registry.group)[name])
    else:
        raise ValueError(f"unknown {registry.kind} {name[:60]!r}: {_hint(registry)}")
    try:
        _attribute(registry.trial)(policy)
    except Exception as error:
        raise ValueError(f"{registry.kind} {name!r} failed on a trial of eight tokens: {_said(error)}") from error
    return policy


def _imported(registry: Registry, name: str, path: str | None = None) -> Callable[..., Any]:
    try:
        policy = _attribute(path or name)
    except Exception as error:  # somebody else's module may raise anything
        raise ValueError(f"{registry.kind} {name!r} cannot be imported: {_said(error)}") from error
    if not callable(policy):
        raise ValueError(f"{registry.kind} {name!r} is not a function")
    return policy


def _attribute(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@lru_cache(maxsize=8)
def _entry_points(group: str) -> dict[str, str]:
    """Name -> "module:function" of what installed packages offer; read once per process."""
    return {entry.name: entry.value for entry in entry_points(group=group)}
