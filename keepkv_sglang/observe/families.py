"""The list of what /metrics says about KeepKV; docs/usage.md explains each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it brings torch, and `keepkv top` reads the names
    from keepkv_sglang.runtime.process import Runtime

Read = Callable[["Runtime"], float]
PREFIX = "keepkv:"
ERRORS = f"{PREFIX}errors_total"
SECONDS = f"{PREFIX}compression_seconds"
VOTES = f"{PREFIX}slot_votes_total"


@dataclass(frozen=True)
class Family:
    """One metric: its name without PREFIX, and how it is read, for each value of `label`; "" where it has none."""

    name: str
    help: str
    reads: Mapping[str, Read]
    label: str = ""

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def _one(name: str, help: str, read: Read) -> Family:
    return Family(name, help, {"": read})


TOTALS = (
    Family(
        "requests_total",
        "Requests that ended: compressed (fewer slots than tokens), whole, or off (never compressed).",
        {
            "compressed": lambda rt: rt.counters.answers_compressed,
            "whole": lambda rt: rt.counters.answers - rt.counters.answers_compressed - rt.counters.answers_off,
            "off": lambda rt: rt.counters.answers_off,
        },
        "result",
    ),
    _one("logical_tokens_total", "Tokens of the rows of ended requests.", lambda rt: rt.counters.logical_tokens),
    _one("saved_slots_total", "Slots that rows of ended requests did not need.", lambda rt: rt.counters.saved_slots),
    _one("merged_tokens_total", "Tokens that joined another's slot.", lambda rt: rt.counters.merged_tokens),
    _one("dropped_tokens_total", "Tokens that lost their slot and are gone.", lambda rt: rt.counters.dropped_tokens),
    _one("prompt_tokens_total", "Prompt tokens of ended requests.", lambda rt: rt.counters.prompt_tokens),
    _one("cached_tokens_total", "Prompt tokens found in the prefix cache.", lambda rt: rt.counters.cached_tokens),
    _one("hit_tokens_total", "Prompt tokens found in compressed spans.", lambda rt: rt.counters.hit_tokens),
    Family(
        "unpacked_tokens_total",
        "Tokens of histories that were read as originals: brought back into slots, or streamed from host memory.",
        {"slots": lambda rt: rt.counters.unpacked_tokens, "streamed": lambda rt: rt.counters.streamed_tokens},
        "into",
    ),
    Family(
        "not_unpacked_total",
        "Histories that were read compressed although originals are kept: no slots, or originals missing.",
        {"no_room": lambda rt: rt.counters.unpack_no_room, "incomplete": lambda rt: rt.counters.unpack_incomplete},
        "reason",
    ),
    _one(
        "archived_tokens_total",
        "Tokens whose originals were written to host memory.",
        lambda rt: rt.counters.archived_tokens,
    ),
    _one(
        "archive_full_tokens_total",
        "Tokens whose originals found host memory full.",
        lambda rt: rt.counters.archive_full_tokens,
    ),
    Family(
        "skipped_total",
        "Compressions that were due and found no slots, or no arena rows for a prompt's or a reply's queries.",
        {
            "no_room": lambda rt: rt.counters.skipped_no_room,
            "no_window": lambda rt: rt.counters.skipped_no_window,
            "reply_window": lambda rt: rt.counters.skipped_reply_window,
        },
        "reason",
    ),
    _one("deferred_total", "Compressions put off to the next step.", lambda rt: rt.counters.deferred),
    _one("parked_total", "Rounds in which a prompt's chunk found no slots.", lambda rt: rt.counters.parked),
    _one("mispublished_total", "Spans withheld: counts disagreed.", lambda rt: rt.counters.mispublished),
    _one(
        "retractions_total",
        "Retracted requests whose rows went into the cache.",
        lambda rt: rt.counters.retractions_published,
    ),
    _one("pressure_tokens_total", "Cold tokens merged under pressure.", lambda rt: rt.counters.pressure_tokens),
    _one("step_seconds_total", "Time of ours between the scheduler's steps.", lambda rt: rt.counters.hook_seconds),
)


def _host_bytes(rt: Runtime, free: bool) -> float:
    """Of host memory for originals, what is free or in use."""
    if rt.originals is None:
        return 0.0
    store = rt.originals.store
    blocks = store.free_blocks if free else store.blocks - store.free_blocks
    return store.nbytes / store.blocks * blocks


GAUGES = (
    _one("entries", "Spans in the prefix cache, beside SGLang's tree.", lambda rt: len(rt.tree.spans)),
    _one(
        "entry_slots",
        "Slots of the prefix cache's spans.",
        lambda rt: rt.tree.spans.evictable_slots + rt.tree.spans.protected_slots,
    ),
    Family(
        "arena_rows",
        "Rows of the query arena.",
        {"used": lambda rt: rt.arena.rows - rt.arena.free_rows, "free": lambda rt: rt.arena.free_rows},
        "state",
    ),
    Family(
        "host_bytes",
        "Host memory for originals.",
        {"used": lambda rt: _host_bytes(rt, free=False), "free": lambda rt: _host_bytes(rt, free=True)},
        "state",
    ),
)
NAMES = (*(family.full_name for family in (*TOTALS, *GAUGES)), ERRORS, SECONDS, VOTES)
