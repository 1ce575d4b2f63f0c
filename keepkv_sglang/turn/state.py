"""What KeepKV remembers about one running request, beside SGLang's own bookkeeping.

SGLang counts slots that exist (physical); only positions are logical. A row of `req_to_token` reads, left to right:

    [ anchor | spans of the prefix cache | own compressed segments | raw tail ]
    0        P                           prot                      tail        length

`prot` is SGLang's cache_protected_len: everything before it belongs to the prefix cache. The raw tail is one slot per
token. It may begin before `prot`: raw spans at the end of the matched chain are compressed with the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.protect import MAX_POSITION
from keepkv_sglang.turn.protection import UNPROTECTED, Protection

LOST = -1


@dataclass
class QueryRows:
    """Arena rows for the queries of logical `positions`, ascending; the first `filled` have been captured.

    filled is LOST for good once a query in between was not captured: its arena row holds somebody else's. The first
    `references` of them are reference queries (compress/queries/references.py), the others the window proper.
    """

    positions: Sequence[int]
    rows: list[int]
    references: int = 0
    filled: int = 0


@dataclass
class Planned:
    """A span that is compressed once its tokens are computed: it ends before logical position `end`.

    first: queries before this logical position never score it: they are the span's before, or were not computed now.
    """

    end: int
    first: int
    is_prompt: bool
    queries: QueryRows | None = None


@dataclass(eq=False, slots=True, weakref_slot=True)
class RequestState:
    """One request between admission and release. Created by runtime/requests.py, reset by retraction."""

    config: KeepKVConfig
    namespace: tuple[Any, ...]
    prompt_tokens: int
    protection: Protection = UNPROTECTED
    prefill_tokens: int = 0  # prompt, and what was generated before a retraction: computed when the row began
    admitted: bool = False
    anchor_len: int = 0
    offset: int = 0  # logical - physical, mirrored in Runtime.offsets for the device
    tail_slots: int = 0  # physical index where the raw tail begins
    tail_tokens: int = 0  # its logical position
    carried: int = 0  # first tokens of the raw tail that the last compression left raw, inside its budget
    merged_tokens: int = 0  # logical position behind the last slot that is not one token's
    own: list[tuple[int, int]] = field(default_factory=list)  # private compressed segments: (tokens, slots)
    plan: list[Planned] = field(default_factory=list)
    reply_queries: QueryRows | None = None
    reply_skipped: int = 0  # logical position at which a reply's window was due that found no room, counted once
    streamed: bool = False  # the originals of its history are read from host memory: it has no slots of them
    known_tokens: int = 0  # where its history is read as originals, logical position behind its last compression
    view_tail: tuple[int, int, int] = (0, 0, 0)  # where streamed, the raw tail of what the prefix cache has of it
    compression: Any = None  # runtime/compressor.py's Compression of the first planned span, in mid-way
    broken: bool = False  # an error of ours: nothing of it is compressed or published any more
    # for the answer (observe/answer.py)
    cached_compressed_tokens: int = 0
    unpacked_tokens: int = 0
    logical_tokens: int = 0
    slots_held: int = 0
    protected_tokens: int = 0
    merged: float = 0.0
    dropped: float = 0.0
    head_share: tuple[float, float] = (1.0, 1.0)  # least and most slots of a head in a compression, over the mean
    # (merged, dropped) of compressions that the device has not been asked for yet: asking waits for it
    uncounted: list[Callable[[], tuple[float, float]]] = field(default_factory=list)
    compressions: int = 0

    @property
    def reply_start(self) -> int:
        """Logical position where the reply's span begins: the last prompt token belongs to it."""
        return self.prompt_tokens - 1

    @property
    def counted_tokens(self) -> int:
        """Logical position up to which the budget is spent: what comes behind it is new."""
        return self.tail_tokens + self.carried

    @property
    def interval_start(self) -> int:
        """Logical position from which the reply's next interval counts."""
        return max(self.counted_tokens, self.reply_start)

    def move_tail(self, slots: int, tokens: int, carried: int = 0) -> None:
        """The raw tail begins here from now on."""
        self.tail_slots, self.tail_tokens, self.carried = slots, tokens, carried

    def begin_row(self, *, anchor_len: int, prefix_tokens: int, prefix_slots: int, tail: tuple[int, int, int]) -> None:
        """At admission. tail: (slots, tokens) where the raw tail begins, at or before the matched prefix's end, and how
        many of its tokens are carried."""
        self.admitted, self.streamed = True, False
        self.anchor_len = anchor_len
        self.offset = prefix_tokens - prefix_slots
        self.move_tail(*tail)
        self.merged_tokens = tail[1]
        self.own, self.plan, self.reply_queries = [], [], None

    def read_compressed(self) -> None:
        """Its history is not compressed again after all: the row goes on behind what the prefix cache has of it."""
        self.streamed, self.known_tokens = False, 0
        self.move_tail(*self.view_tail)
        self.merged_tokens = self.tail_tokens

    def count_merged(self) -> None:
        """Brings `merged` and `dropped` up to date."""
        for ask in self.uncounted:
            merged, dropped = ask()
            self.merged += merged
            self.dropped += dropped
        self.uncounted = []

    def slots_for(self, start: int, end: int) -> int:
        """Slots that the tokens [start, end) get.

        A fraction counts per part, prompt or reply (decision 6); a whole number is for all parts together. Carried
        tokens were counted before, with a slot each. Protected tokens come on top. Fair shares are inside; where they
        round up, together with the sinks, they may be more.
        """
        config, protection = self.config, self.protection
        whole = protection.count(start, end)
        if config.counts_slots:
            return int(config.budget) + whole
        new = max(start, self.counted_tokens)
        origin = self.reply_start if new >= self.reply_start else new
        before = new - origin - protection.count(origin, new)
        kept = config.kept_slots(before, before + end - new - protection.count(new, end))
        kept += new - start - protection.count(start, new)
        if shares := protection.shares_in(start, end, config.budget):
            kept = max(kept, sum(least for _, _, least in shares) + self.sinks_of(start))
        return kept + whole

    def sinks_of(self, start: int) -> int:
        """Sinks of a span that begins at logical position `start`: the sequence's first tokens that are not whole."""
        sinks = self.config.sinks
        return sinks - self.protection.count(0, sinks) if start == 0 else 0

    def protected_in(self, slots: int, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Index ranges of the protected tokens among `slots` slots of the row that stand for tokens [start, end).

        A merge puts protected tokens first. So, where a budget in slots merges again what was merged before, they are
        the first ones of the merged part; behind it there is one slot per token.
        """
        merged = max(start, self.merged_tokens)
        at = slots - (end - merged)
        first = self.protection.count(start, merged)
        behind = tuple((at + a, at + b) for a, b in self.protection.whole_in(merged, end))
        return ((0, first), *behind) if first else behind

    def reply_growth(self, tokens: int) -> int:
        """Most slots that `tokens` more generated tokens take: what their budget keeps, and one raw interval."""
        if self.config.counts_slots:
            kept = int(self.config.budget)
        else:
            kept = self.config.kept_slots(0, max(tokens, 1))
        kept += self.protection.count(self.reply_start, MAX_POSITION)
        return min(tokens, kept + self.config.interval)

    def borders(self, start: int, end: int) -> list[tuple[int, bool]]:
        """Where spans end when tokens [start, end) are computed in one go: (logical end, is it the prompt's?).

        After a retraction that lost its entries the reply is computed again with the prompt; it is cut where decoding
        had cut it, so that the result does not depend on the retraction.
        """
        cuts = [(end, True) for end in self.prompt_cuts(start)]
        position = max(start, self.reply_start) + self.config.interval
        while position <= end:
            cuts.append((position, False))
            position += self.config.interval
        return cuts

    def prompt_cuts(self, start: int) -> list[int]:
        """Ends of the prompt's spans from logical position `start` on: one, or one per span_tokens.

        Counted from the end of what was matched, so two prompts that part later are cut alike before that. The last
        piece is never shorter than min_tokens. A budget in slots merges everything together: it is not cut.
        """
        end, step = self.reply_start, self.config.span_tokens
        if start >= end:
            return []
        if not step or self.config.counts_slots:
            return [end]
        return [*range(start + step, end - self.config.min_tokens + 1, step), end]

    def held_queries(self) -> list[QueryRows]:
        """Every set of arena rows that the request holds."""
        return [rows for rows in (*(planned.queries for planned in self.plan), self.reply_queries) if rows is not None]

    def spoil_queries(self) -> None:
        """Queries of this step are lost: nothing that is open now will be scored with."""
        for rows in self.held_queries():
            rows.filled = LOST

    def drop_queries(self) -> list[int]:
        """Arena rows of every set still held; the caller gives them back."""
        dropped = [row for rows in self.held_queries() for row in rows.rows]
        for planned in self.plan:
            planned.queries = None
        self.reply_queries = None
        return dropped
