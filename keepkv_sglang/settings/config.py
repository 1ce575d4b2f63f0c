"""The resolved KeepKV configuration: one frozen record from flags and per-request parameters.

Each field is one option (option.py): its default, parser, help text and scope. Units: slots = KV slots of the pool,
tokens = logical tokens, queries = query vectors, steps = decode steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from keepkv_sglang.compress import registry
from keepkv_sglang.settings import bounds, values
from keepkv_sglang.settings.bounds import AT_LEAST, AT_MOST, MERGE_RULES, PIECES, SCORERS
from keepkv_sglang.settings.option import option, options_of
from keepkv_sglang.settings.protect import parse_fair, parse_protect
from keepkv_sglang.settings.values import ConfigError, shown

__all__ = ["OPTIONS", "REQUEST_KEYS", "ConfigError", "KeepKVConfig"]

PRESSURE_MODES = ("off", "merge")
HOST_DTYPES = ("auto", "int8", "int4")
UNPACK_OVERFLOW = ("stream", "view")
MAX_HOST_RATIO = 1 << 16
MAX_WINDOW = 256
MAX_REFERENCES = 1024
MIN_SPAN_TOKENS = 64
MAX_CHUNK = 1024
# Bump when scoring, selection or merging change in a way that makes old entries mean something else.
ALGORITHM_VERSION = 3


@dataclass(frozen=True)
class KeepKVConfig:
    """What one request runs with. Frozen and hashable: it is part of every entry's key."""

    enabled: bool = option(
        False,
        parse=values.flag("enabled"),
        help="Merge cold KV-cache tokens under a per-request budget (KeepKV). Selects KeepKV's attention and "
        "radix-cache backends.",
    )
    budget: float | int = option(
        0.2,
        parse=values.budget,
        unit="fraction, or slots",
        help="KV slots kept: a fraction in (0, 1] of each turn's tokens, or a whole number of slots from 2 up that"
        " the request may hold past its shared prefix. 1 means 100 %, no compression.",
    )
    merge: str = option(
        "attention_matching",
        parse=values.text(lambda value: registry.check(registry.MERGE_RULES, value)),
        bound=bounds.one_of(MERGE_RULES),
        help="How tokens that lose their slot join the slots that stay; evict drops them. One of "
        f"{', '.join(MERGE_RULES)}, the name of an installed plugin's rule, or a path package.module:function.",
    )
    scorer: str = option(
        "window_references",
        parse=values.text(lambda value: registry.check(registry.SCORERS, value)),
        bound=bounds.one_of(SCORERS),
        help="What decides which tokens keep their slot. One of "
        f"{', '.join(SCORERS)}, the name of an installed plugin's scorer, or a path package.module:function.",
    )
    heads: str = option(
        "all",
        parse=values.text(lambda value: registry.check(registry.HEADS, value)),
        bound=bounds.one_of(registry.HEADS.names),
        on_gpu="uniform",
        help="How a span's cells, one K and V per slot, layer and kv head, are shared out: uniform, the same number for"
        " all, as most papers have it; layer, the heads of a layer share theirs; all, all layers and heads do; or the"
        " name of an installed plugin's sharing, or a path package.module:function. For fractional budgets and scorers"
        " that can be compared, on a CPU and with keepkv_triton; elsewhere uniform. On a GPU a request may ask for"
        " another value only where the server's is not uniform.",
    )
    chunk: int = option(
        1,
        parse=values.whole("chunk", 1, MAX_CHUNK),
        unit="tokens",
        bound=bounds.one_of(bounds.CHUNKS),
        help=f"Tokens that are kept or dropped together, as in ChunkKV; 1: each on its own (1 to {MAX_CHUNK}).",
    )
    window: int = option(
        32,
        parse=values.whole("window", 1, MAX_WINDOW),
        unit="queries",
        bound=AT_MOST,
        scaled=1,
        help=f"Number of last queries whose attention scores the tokens (1 to {MAX_WINDOW}).",
    )
    references: int = option(
        256,
        parse=values.whole("references", 0, MAX_REFERENCES),
        unit="queries",
        bound=AT_MOST,
        help="Queries of tokens all over a prompt that score it beside the window, moved to the positions behind its "
        f"end (0 to {MAX_REFERENCES}; 0 for the published form of other scorers and merge rules).",
    )
    recent: int = option(
        64,
        parse=values.whole("recent", 0, 1 << 20),
        unit="tokens",
        scaled=1,
        help="Most recent tokens of a request that keep a slot each until newer ones come (at most half of a "
        "span's slots).",
    )
    sinks: int = option(
        4,
        parse=values.whole("sinks", 0, 1 << 20),
        unit="tokens",
        scaled=1,
        help="First tokens of the sequence that are always kept (only where nothing precedes them).",
    )
    threshold: float = option(
        0.85,
        parse=values.real("threshold", -1, 1, "a cosine similarity"),
        unit="cosine",
        help="Cosine similarity of keys above which a token is merged instead of dropped (-1 to 1).",
    )
    interval: int = option(
        128,
        parse=values.whole("interval", 2, 1 << 20),
        unit="steps",
        bound=AT_LEAST,
        scaled=2,
        help="Generated tokens between two compressions of the reply.",
    )
    min_tokens: int = option(
        64,
        parse=values.whole("min_tokens", 2, 1 << 30),
        unit="tokens",
        bound=AT_LEAST,
        scaled=2,
        help="Turns with fewer tokens than this stay whole until the next turn.",
    )
    span_tokens: int = option(
        0,
        parse=values.zero_or_at_least("span_tokens", MIN_SPAN_TOKENS, "turns stay whole"),
        unit="tokens",
        bound=PIECES,
        scaled=1,
        help="Cut long turns into cache entries of this many tokens, each scored by its own last queries and "
        "reusable on its own; 0: a turn is one entry.",
    )
    protect: str = option(
        "",
        parse=values.text(parse_protect),
        by_token=True,
        help="Tokens that stay whole, neither dropped nor merged, on top of the budget: 'system' (the first "
        "message) and ranges start-end of token positions, the end not included, such as system,900-950. "
        "Empty: none.",
    )
    fair: str = option(
        "",
        parse=values.text(parse_fair),
        by_token=True,
        help="Ranges of which each keeps at least its share of a fractional budget, so that no instruction is "
        "starved by another, such as 100-180,180-260. Empty: none.",
    )
    pressure: str = option(
        "off",
        parse=values.choice("pressure", PRESSURE_MODES),
        server=True,
        choices=PRESSURE_MODES,
        help="merge: when free KV slots run low, cold cached prefixes that are still uncompressed are merged "
        "between steps before anything is evicted; off: they are evicted.",
    )
    pressure_free: float = option(
        0.1,
        parse=values.real("pressure_free", 0, 0.9, "a fraction of the pool"),
        unit="fraction",
        server=True,
        help="Free part of the pool below which cold prefixes are merged.",
    )
    pressure_tokens: int = option(
        1024,
        parse=values.whole("pressure_tokens", 64, 1 << 30),
        unit="tokens",
        server=True,
        scaled=1,
        help="Most tokens merged under pressure per scheduler step.",
    )
    step_tokens: int = option(
        2048,
        parse=values.whole("step_tokens", 64, 1 << 30),
        unit="slots",
        server=True,
        help="KV slots that a scheduler step compresses before the other requests that are due wait for the next "
        "one; the first is never put off.",
    )
    piece_tokens: int = option(
        0,
        parse=values.whole("piece_tokens", 0, 1 << 30),
        unit="slots",
        server=True,
        shapes=False,
        help="A longer prompt is compressed in pieces, one with each token of its reply. A piece is as much work as so"
        " many slots are in all layers, so that other streams never stop for all of it. 0: at once.",
    )
    host_ratio: float = option(
        0.0,
        parse=values.real("host_ratio", 0, MAX_HOST_RATIO, "a number of pools"),
        unit="pools",
        server=True,
        shapes=False,
        help="Originals of compressed tokens are kept in host memory, for so many times the tokens that the KV pool"
        " holds; a new turn is read over them. 0: what compression drops is gone.",
    )
    host_size: float = option(
        0.0,
        parse=values.real("host_size", 0, 1 << 20, "gigabytes"),
        unit="GB per rank",
        server=True,
        shapes=False,
        help="The same as an amount of host memory (1 GB is 10^9 bytes) for each tensor-parallel rank; it goes before"
        " --keepkv-host-ratio. 0: the ratio counts.",
    )
    host_dtype: str = option(
        "auto",
        parse=values.choice("host_dtype", HOST_DTYPES),
        server=True,
        shapes=False,
        choices=HOST_DTYPES,
        help="How originals are stored: auto, as they lie in the KV pool, or int8 or int4, with scales.",
    )
    unpack: float = option(
        0.5,
        parse=values.unpack,
        unit="fraction",
        bound=AT_MOST,
        shapes=False,
        help="Most of the KV pool that originals of running requests may take at once; a history that does not fit is"
        " read as --keepkv-unpack-overflow says. 0, or false in a request: never.",
    )
    unpack_overflow: str = option(
        "stream",
        parse=values.choice("unpack_overflow", UNPACK_OVERFLOW),
        server=True,
        shapes=False,
        choices=UNPACK_OVERFLOW,
        help="A history that finds no slots for its originals: stream, they are read from host memory, layer by layer,"
        " while the turn's prompt is computed, and again when it is compressed; view: it is read compressed.",
    )
    record: str = option(
        "",
        parse=values.folder("record"),
        unit="folder",
        server=True,
        shapes=False,
        help="Folder for what requests say and what compression makes of it, readable by its owner only: keepkv inspect"
        " makes a page of it. Costs time and disk; it is never emptied. Empty: nothing is recorded.",
    )
    configurations: int = option(
        64,
        parse=values.whole("configurations", 1, 1 << 16),
        server=True,
        help="Most different settings that requests may use at the same time, cached ones included; a request with"
        " further ones is refused.",
    )
    request_keys: str = option(
        "",
        parse=values.text(lambda value: bounds.parse_opened(value, BOUNDED)),
        server=True,
        help="Keys that a request may set beyond the server's own values: all, or names joined by commas. Empty: none.",
    )

    def __post_init__(self) -> None:
        for name, item in OPTIONS.items():
            # frozen: normalised values (1.0 from 1) are written once, here
            object.__setattr__(self, name, item.parse(getattr(self, name)))
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
        unknown = sorted(str(key) for key in params if key not in OPTIONS)
        if unknown:
            raise ConfigError(f"keepkv: unknown key {values.names(unknown)}; known keys: {', '.join(REQUEST_KEYS)}")
        barred = sorted(key for key in params if OPTIONS[key].server)
        if barred:
            flags = ", ".join(f"--keepkv-{key.replace('_', '-')}" for key in barred)
            raise ConfigError(f"keepkv: {', '.join(barred)}: a setting of the server; start it with {flags} instead")
        wanted = {key: self._of_request(key, value) for key, value in params.items()}
        if not self.enabled:
            wanted["enabled"] = False
        return replace(self, **wanted)

    def _of_request(self, key: str, value: Any) -> Any:
        """One value of a request, checked and within the server's bounds."""
        names = {"scorer": registry.SCORERS, "merge": registry.MERGE_RULES, "heads": registry.HEADS}.get(key)
        if names is None:
            value = OPTIONS[key].parse(value)
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
        bounds.check(key, OPTIONS[key].bound, value, getattr(self, key), self.request_keys)
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
        shaping = sorted((k, repr(v)) for k, v in asdict(self).items() if OPTIONS[k].shapes and not OPTIONS[k].by_token)
        return hashlib.sha256(repr((ALGORITHM_VERSION, shaping)).encode()).hexdigest()[:16]

    @property
    def keeps_originals(self) -> bool:
        """True when the server has host memory for the originals of what it compresses."""
        return self.host_ratio > 0 or self.host_size > 0

    @property
    def streams_originals(self) -> bool:
        """True when the server reads histories that find no slots from there."""
        return self.keeps_originals and self.unpack > 0 and self.unpack_overflow == "stream"

    def kept_slots(self, start: int, end: int) -> int:
        """Slots for the tokens [start, end) of a growing span, so that [0, end) keeps ceil(budget * end).

        start, end: token counts from the beginning of the prompt part or of the reply part. At least 1.
        Fractions only; the epsilon keeps 0.1 * 30 from becoming 4 through rounding.
        """
        assert not self.counts_slots
        return max(1, math.ceil(self.budget * end - 1e-9) - math.ceil(self.budget * start - 1e-9))


OPTIONS = options_of(KeepKVConfig)
REQUEST_KEYS = tuple(name for name, item in OPTIONS.items() if not item.server)
BOUNDED: tuple[str, ...] = tuple(name for name, item in OPTIONS.items() if item.bound is not None)


def from_text(field: str, text: str) -> Any:
    """One setting from the command line, where numbers are text. Raises ConfigError."""
    numeric = not isinstance(getattr(KeepKVConfig, field), str | bool)
    return OPTIONS[field].parse(values.number_from_text(text) if numeric else text)
