"""How far a request may move away from what the server was started with.

What one request asks for decides how long the others wait: more queries or more frequent compressions cost the
scheduler's thread seconds. So the server's own settings bound a request's, unless `--keepkv-request-keys` opens a key.

| key | a request may ask for |
|---|---|
| window, references | at most the server's |
| interval, min_tokens | at least the server's |
| span_tokens | 0, or at least the server's where that is not 0 |
| chunk, scorer, merge | the server's, or one of a list |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keepkv_sglang.compress import registry
from keepkv_sglang.settings.values import SHOWN, ConfigError, shown

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)
MERGE_RULES = registry.MERGE_RULES.names
SCORERS = tuple(name for name in registry.SCORERS.names if name not in registry.OFFLINE_SCORERS)

Bound = Callable[[Any, Any], str | None]
"""(the request's value, the server's) -> None, or what to use instead."""


def _at_most(value: Any, server: Any) -> str | None:
    return None if value <= server else f"use at most {server}"


def _at_least(value: Any, server: Any) -> str | None:
    return None if value >= server else f"use at least {server}"


def _pieces(value: Any, server: Any) -> str | None:
    if value == 0 or 0 < server <= value:
        return None
    return f"use 0 or at least {server}" if server else "use 0"


def _one_of(known: tuple[Any, ...]) -> Bound:
    def bound(value: Any, server: Any) -> str | None:
        names = known if server in known else (server, *known)
        return None if value in names else f"use one of {', '.join(str(name) for name in names)}"

    return bound


BOUNDS: Mapping[str, Bound] = {
    "window": _at_most,
    "references": _at_most,
    "interval": _at_least,
    "min_tokens": _at_least,
    "span_tokens": _pieces,
    "chunk": _one_of(CHUNKS),
    "scorer": _one_of(SCORERS),
    "merge": _one_of(MERGE_RULES),
}
ALL = "all"


def parse_opened(value: Any) -> str:
    """The canonical text of --keepkv-request-keys: "", "all", or names of BOUNDS in its order; ValueError otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"request_keys {shown(value)} is not text; use names such as window,references")
    parts = {part.strip() for part in value.split(",")} if value.strip() else set()
    if ALL in parts:
        return ALL
    unknown = sorted(parts - set(BOUNDS))
    if unknown:
        raise ValueError(
            f"request_keys: {unknown[0][:SHOWN]!r} is no key that has a bound; use {ALL} or some of {', '.join(BOUNDS)}"
        )
    return ",".join(key for key in BOUNDS if key in parts)


def check(key: str, value: Any, server: Any, opened: str) -> None:
    """Raises ConfigError where the request's value for `key` goes beyond the server's. value: of the right type."""
    if key not in BOUNDS or opened == ALL or key in opened.split(","):
        return
    instead = BOUNDS[key](value, server)
    if instead is not None:
        raise ConfigError(
            f"keepkv: {key} {shown(value)} goes beyond what this server allows a request: {instead}, or start the "
            f"server with --keepkv-request-keys {key}"
        )
