"""How far a request may move away from what the server was started with.

What one request asks for decides how long the others wait: more queries or more frequent compressions cost the
scheduler's thread seconds. So the server's own settings bound a request's, unless `--keepkv-request-keys` opens a key.
Which option has which bound stands in config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from keepkv_sglang.compress import registry
from keepkv_sglang.settings.values import SHOWN, ConfigError, shown

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)
MERGE_RULES = registry.MERGE_RULES.names
SCORERS = tuple(name for name in registry.SCORERS.names if name not in registry.OFFLINE_SCORERS)
ALL = "all"


class Bound(NamedTuple):
    """text: the rule in words. instead(the request's value, the server's): None, or what to use instead."""

    text: str
    instead: Callable[[Any, Any], str | None]


AT_MOST = Bound("at most the server's", lambda value, server: None if value <= server else f"use at most {server}")
AT_LEAST = Bound("at least the server's", lambda value, server: None if value >= server else f"use at least {server}")


def _pieces(value: Any, server: Any) -> str | None:
    if value == 0 or 0 < server <= value:
        return None
    return f"use 0 or at least {server}" if server else "use 0"


PIECES = Bound("0, or at least the server's where that is not 0", _pieces)


def one_of(known: tuple[Any, ...]) -> Bound:
    """The server's value, or one of these."""

    def instead(value: Any, server: Any) -> str | None:
        names = known if server in known else (server, *known)
        return None if value in names else f"use one of {', '.join(str(name) for name in names)}"

    return Bound(f"the server's, or one of {', '.join(str(name) for name in known)}", instead)


def parse_opened(value: Any, bounded: Iterable[str]) -> str:
    """The canonical text of --keepkv-request-keys: "", "all", or names of `bounded` in its order; ValueError
    otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"request_keys {shown(value)} is not text; use names such as window,references")
    known = tuple(bounded)
    parts = {part.strip() for part in value.split(",")} if value.strip() else set()
    if ALL in parts:
        return ALL
    unknown = sorted(parts - set(known))
    if unknown:
        raise ValueError(
            f"request_keys: {unknown[0][:SHOWN]!r} is no key that has a bound; use {ALL} or some of {', '.join(known)}"
        )
    return ",".join(key for key in known if key in parts)


def check(key: str, bound: Bound | None, value: Any, server: Any, opened: str) -> None:
    """Raises ConfigError where the request's value for `key` goes beyond the server's. value: of the right type."""
    if bound is None or opened == ALL or key in opened.split(","):
        return
    instead = bound.instead(value, server)
    if instead is not None:
        raise ConfigError(
            f"keepkv: {key} {shown(value)} goes beyond what this server allows a request: {instead}, or start the "
            f"server with --keepkv-request-keys {key}"
        )
