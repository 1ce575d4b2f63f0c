"""The resolved KeepKV configuration: one frozen record from flags and per-request parameters.

One place decides names, defaults, ranges and help texts; `flags.py` builds the command line from it and
`hooks/frontend.py` checks requests with it. Units are in the names where they are not obvious:
slots = KV slots of the pool, tokens = logical tokens, queries = query vectors, steps = decode steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from keepkv_sglang.compress import registry
from keepkv_sglang.settings import bounds, protect, values
from keepkv_sglang.settings.bounds import MERGE_RULES, SCORERS
from keepkv_sglang.settings.values import ConfigError, shown

__all__ = ["HELP", "PARSERS", "REQUEST_KEYS", "ConfigError", "KeepKVConfig"]

PRESSURE_MODES = ("off", "merge")
# No request may choose these for its neighbours.
SERVER_ONLY = ("pressure", "pressure_free", "pressure_tokens", "step_tokens", "configurations", "request_keys")
MAX_WINDOW = 256
MAX_REFERENCES = 1024
MIN_SPAN_TOKENS = 64
MAX_CHUNK = 1024
KEYED_BY_TOKEN = ("protect", "fair")  # part of a span's tokens instead: protect.py
# Bump when scoring, selection or merging change in a way that makes old entries mean something else.
ALGORITHM_VERSION = 3


@dataclass(frozen=True)
class KeepKVConfig:
    """What one request runs with. Frozen and hashable: it is part of every entry's key."""

    enabled: bool = False
    budget: float | int = 0.2
    merge: str = "attention_matching"
    scorer: str = "window_references"
    chunk: int = 1
    window: int = 32
    references: int = 256
    recent: int = 64
    sinks: int = 4
    threshold: float = 0.85
    interval: int = 128
    min_tokens: int = 64
    span_tokens: int = 0
    protect: str = ""
    fair: str = ""
    pressure: str = "off"
    pressure_free: float = 0.1
    pressure_tokens: int = 1024
    step_tokens: int = 2048
    configurations: int = 64
    request_keys: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            # frozen: normalised values (0.2 from "0.2") are written once, here
            object.__setattr__(self, field.name, PARSERS[field.name](getattr(self, field.name)))
        if 0 < self.span_tokens < self.min_tokens:
            raise ConfigError(
                f"span_tokens {self.span_tokens} is below min_tokens {self.min_tokens}: no entry would be compressed; "
                "use a larger span_tokens or 0"
            )
        if self.fair and self.counts_slots:
            raise ConfigError(
                f"fair needs a budget that is a fraction, and it is {self.budget} slots: a share is a part of it; "
                'use a fraction such as 0.2, or leave out fair (fair: "" where the server sets it)'
            )

    def with_request(self, params: Mapping[str, Any] | None) -> KeepKVConfig:
        """This configuration with one request's ``custom_params["keepkv"]`` applied.

        Raises ConfigError for an unknown key or a bad value. A request cannot switch KeepKV on in a
        server that was started without it; ``enabled: true`` is allowed and changes nothing there.
        """
        if params is None:
            return self
        if not isinstance(params, Mapping):
            raise ConfigError(
                f'custom_params["keepkv"] must be an object such as {{"budget": 0.2}}, not {shown(params)}'
            )
        unknown = sorted(str(key) for key in params if key not in PARSERS)
        if unknown:
            raise ConfigError(f"keepkv: unknown key {values.names(unknown)}; known keys: {', '.join(REQUEST_KEYS)}")
        barred = sorted(key for key in params if key in SERVER_ONLY)
        if barred:
            raise ConfigError(f"keepkv: {', '.join(barred)} is a setting of the server; start it with the flag instead")
        wanted = {key: self._of_request(key, value) for key, value in params.items()}
        if not self.enabled:
            wanted["enabled"] = False
        return replace(self, **wanted)

    def _of_request(self, key: str, value: Any) -> Any:
        """One value of a request, checked and within the server's bounds."""
        names = {"scorer": registry.SCORERS, "merge": registry.MERGE_RULES}.get(key)
        if names is None:
            value = PARSERS[key](value)
        elif not isinstance(value, str):
            raise ConfigError(
                f"keepkv: {names.kind} {shown(value)} is not a name; use one of {', '.join(names.known())}"
            )
        elif registry.is_path(value):
            raise ConfigError(
                f"keepkv: {key} is a path, and a request must not import code; start the server with "
                f"--keepkv-{key}, or use a name"
            )
        elif value != getattr(self, key) and value not in (known := names.known()):
            raise ConfigError(f"keepkv: unknown {names.kind} {shown(value)}; use one of {', '.join(known)}")
        bounds.check(key, value, getattr(self, key), self.request_keys)
        return value

    @property
    def compresses(self) -> bool:
        """False when nothing of the request is ever merged: switched off, or the budget is 100 %."""
        return self.enabled and self.budget != 1.0

    @property
    def counts_slots(self) -> bool:
        """True when the budget is a number of slots for the whole request, not a fraction per turn."""
        return isinstance(self.budget, int)

    def fingerprint(self) -> str:
        """Hash of every value that shapes all of an entry."""
        values = sorted((k, repr(v)) for k, v in asdict(self).items() if k not in KEYED_BY_TOKEN)
        return hashlib.sha256(repr((ALGORITHM_VERSION, values)).encode()).hexdigest()[:16]

    def kept_slots(self, start: int, end: int) -> int:
        """Slots for the tokens [start, end) of a growing span, so that [0, end) keeps ceil(budget * end).

        start, end: token counts from the beginning of the prompt part or of the reply part. At least 1.
        Fractions only; the epsilon keeps 0.1 * 30 from becoming 4 through rounding.
        """
        assert not self.counts_slots
        return max(1, math.ceil(self.budget * end - 1e-9) - math.ceil(self.budget * start - 1e-9))


PARSERS: dict[str, Callable[[Any], Any]] = {
    "enabled": values.flag("enabled"),
    "budget": values.budget,
    "merge": values.text(lambda value: registry.check(registry.MERGE_RULES, value)),
    "scorer": values.text(lambda value: registry.check(registry.SCORERS, value)),
    "chunk": values.whole("chunk", 1, MAX_CHUNK),
    "window": values.whole("window", 1, MAX_WINDOW),
    "references": values.whole("references", 0, MAX_REFERENCES),
    "recent": values.whole("recent", 0, 1 << 20),
    "sinks": values.whole("sinks", 0, 1 << 20),
    "threshold": values.real("threshold", -1, 1, "a cosine similarity"),
    "interval": values.whole("interval", 2, 1 << 20),
    "min_tokens": values.whole("min_tokens", 2, 1 << 30),
    "span_tokens": values.zero_or_at_least("span_tokens", MIN_SPAN_TOKENS, "turns stay whole"),
    "protect": values.text(protect.parse_protect),
    "fair": values.text(protect.parse_fair),
    "pressure": values.choice("pressure", PRESSURE_MODES),
    "pressure_free": values.real("pressure_free", 0, 0.9, "a fraction of the pool"),
    "pressure_tokens": values.whole("pressure_tokens", 64, 1 << 30),
    "step_tokens": values.whole("step_tokens", 64, 1 << 30),
    "configurations": values.whole("configurations", 1, 1 << 16),
    "request_keys": values.text(bounds.parse_opened),
}


def from_text(field: str, text: str) -> Any:
    """One setting from the command line, where numbers are text. Raises ConfigError."""
    numeric = not isinstance(getattr(KeepKVConfig, field), str | bool)
    return PARSERS[field](values.number_from_text(text) if numeric else text)


REQUEST_KEYS = tuple(key for key in PARSERS if key not in SERVER_ONLY)

HELP: dict[str, str] = {
    "enabled": "Merge cold KV-cache tokens under a per-request budget (KeepKV). Selects KeepKV's attention "
    "and radix-cache backends.",
    "budget": "KV slots kept: a fraction in (0, 1] of each turn's tokens, or a whole number of slots from 2 "
    "up that the request may hold past its shared prefix. 1 means 100 %%, no compression.",
    "merge": "How tokens that lose their slot join the slots that stay; evict drops them. One of "
    f"{', '.join(MERGE_RULES)}, the name of an installed plugin's rule, or a path package.module:function.",
    "scorer": "What decides which tokens keep their slot. One of "
    f"{', '.join(SCORERS)}, the name of an installed plugin's scorer, or a path package.module:function.",
    "chunk": f"Tokens that are kept or dropped together, as in ChunkKV; 1: each on its own (tokens, 1 to {MAX_CHUNK}).",
    "window": f"Number of last queries whose attention scores the tokens (1 to {MAX_WINDOW}).",
    "references": "Queries of tokens all over a prompt that score it beside the window, moved to the positions behind "
    f"its end (0 to {MAX_REFERENCES}; 0 for the published form of other scorers and merge rules).",
    "recent": "Most recent tokens of a request that keep a slot each until newer ones come (tokens; at most half of a "
    "span's slots).",
    "sinks": "First tokens of the sequence that are always kept (tokens; only where nothing precedes them).",
    "threshold": "Cosine similarity of keys above which a token is merged instead of dropped (-1 to 1).",
    "interval": "Generated tokens between two compressions of the reply (decode steps).",
    "min_tokens": "Turns with fewer tokens than this stay whole until the next turn (tokens).",
    "span_tokens": "Cut long turns into cache entries of this many tokens, each scored by its own last queries and "
    "reusable on its own; 0: a turn is one entry (tokens).",
    "protect": "Tokens that stay whole, neither dropped nor merged, on top of the budget: 'system' (the first message) "
    "and ranges start-end of token positions, the end not included, such as system,900-950. Empty: none.",
    "fair": "Ranges of which each keeps at least its share of a fractional budget, so that no instruction is starved "
    "by another, such as 100-180,180-260. Empty: none.",
    "pressure": "merge: when free KV slots run low, cold cached prefixes that are still uncompressed are merged "
    "between steps before anything is evicted; off: they are evicted.",
    "pressure_free": "Free part of the pool below which cold prefixes are merged (fraction of all KV slots).",
    "pressure_tokens": "Most tokens merged under pressure per scheduler step.",
    "step_tokens": "KV slots that a scheduler step compresses before the other requests that are due wait for the next "
    "one; the first is never put off.",
    "configurations": "Most different settings that requests may use at the same time, cached ones included; a request "
    "with further ones is refused.",
    "request_keys": "Keys that a request may set beyond the server's own values: all, or some of "
    f"{', '.join(bounds.BOUNDS)}. Empty: window and references at most the server's, interval and min_tokens at least.",
}
