"""Which span of a turn is due, what it becomes, and what the request's counts are afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from keepkv_sglang.compress.select import SpanPolicy, left_raw
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.turn.state import LOST, Planned, QueryRows, RequestState


@dataclass(frozen=True)
class DueSpan:
    """Slots [start, start + slots) of a request's row, which stand for `tokens` tokens up to logical position `end`,
    become m slots.

    policy: how. queries: what scores them. left: how many of the m are single tokens at the end that stay in the raw
    tail and are compressed with what follows: were they part of it for good, every turn would spend up to half of its
    slots on an end that was recent once. is_prompt: it is published at once. originals: what is merged is read from
    host memory, one K and V per token, instead of these slots.
    """

    start: int
    slots: int
    tokens: int
    end: int
    m: int
    policy: SpanPolicy
    queries: QueryRows
    left: int
    is_prompt: bool
    originals: bool = False

    @property
    def sources(self) -> int:
        """How many K and V per head are merged."""
        return self.tokens if self.originals else self.slots

    @property
    def first(self) -> int:
        """Logical position of its first token."""
        return self.end - self.tokens

    @property
    def closed_end(self) -> int:
        """Logical position behind the tokens that are compressed for good."""
        return self.end - self.left

    @property
    def closed_slots(self) -> int:
        """Slots of these tokens."""
        return self.m - self.left


class Raw(Enum):
    """A span that is due and is not compressed."""

    OPEN = "the raw tail stays open: what comes next takes it in"
    CLOSED = "it stays whole"


def span_start(state: RequestState) -> tuple[int, int]:
    """(slots, tokens) where the next span begins: the raw tail, or the anchor under a budget in slots."""
    if state.config.counts_slots:
        return state.anchor_len, state.anchor_len
    return state.tail_slots, state.tail_tokens


def due_slots(state: RequestState, committed: int) -> int:
    """Slots of the spans that would be compressed now, with `committed` slots in the row; 0: nothing is due."""
    if state.broken:
        return 0
    start = span_start(state)[0]
    computed = committed + state.offset
    ends = [planned.end for planned in state.plan if planned.end <= computed]
    if ends:
        return max(1, ends[-1] - state.offset - start)
    return committed - start if not state.plan and reply_due(state, committed) else 0


def reply_due(state: RequestState, committed: int) -> bool:
    """Whether the raw tail is an interval long and its queries are complete, or known to be lost."""
    queries = state.reply_queries
    if queries is None or committed + state.offset < state.interval_start + state.config.interval:
        return False
    return queries.filled == LOST or queries.filled >= len(queries.rows)


def planned_span(state: RequestState, planned: Planned, committed: int) -> DueSpan | Raw:
    """What becomes of a planned span whose tokens are computed."""
    start_slots, start_tokens = span_start(state)
    slots = planned.end - state.offset - start_slots
    tokens = planned.end - start_tokens
    m = state.slots_for(start_tokens, planned.end)
    new = tokens if state.config.counts_slots else planned.end - state.counted_tokens
    if fresh := fresh_tokens(state, planned.end):
        m = state.slots_for(start_tokens, state.known_tokens) + fresh
    short = planned.is_prompt and new < state.config.min_tokens
    queries = planned.queries
    if short and state.carried:
        return Raw.OPEN
    # A streamed history's result may take as many slots as its match had; more were not promised.
    full = m > slots or m >= tokens if state.streamed else m >= slots
    if short or full or queries is None or queries.filled <= 0:
        return Raw.CLOSED
    followed = planned.is_prompt and planned.end < min(state.reply_start, committed + state.offset)
    return _due(state, start_slots, slots, start_tokens, planned.end, m, queries, followed, planned.is_prompt)


def fresh_tokens(state: RequestState, end: int) -> int:
    """Of a history that is read as originals: tokens between its last compression and `end`, where these are fewer than
    min_tokens. They stay whole, as they would without originals; else 0."""
    new = end - state.known_tokens
    return new if state.known_tokens and 0 < new < state.config.min_tokens and not state.config.counts_slots else 0


def reply_span(state: RequestState, committed: int) -> DueSpan | Raw:
    """What becomes of the reply's raw tail, which is due."""
    assert state.reply_queries is not None
    if state.reply_queries.filled == LOST:
        return Raw.OPEN
    start_slots, start_tokens = span_start(state)
    end = committed + state.offset
    m = state.slots_for(start_tokens, end)
    slots = committed - start_slots
    if m >= slots:
        return Raw.CLOSED
    return _due(state, start_slots, slots, start_tokens, end, m, state.reply_queries, False, False)


def _due(
    state: RequestState,
    start: int,
    slots: int,
    first: int,
    end: int,
    m: int,
    queries: QueryRows,
    followed: bool,
    is_prompt: bool,
) -> DueSpan:
    """followed: the next span of the same prompt is computed already: this one's recent tokens need no protection."""
    config = state.config
    sources = end - first if state.streamed else slots
    carried = state.counted_tokens - first if first == state.tail_tokens else 0
    if fresh := fresh_tokens(state, end):
        carried = fresh - state.protection.count(state.known_tokens, end)  # protected ones have their slots already
    policy = span_policy(
        config,
        m,
        sinks=state.sinks_of(first),
        followed=followed,
        whole=state.protected_in(sources, first, end),
        shares=() if config.counts_slots else state.protection.shares_in(first, end, config.budget),
        carried=carried,
    )
    # A budget in slots merges everything again anyway.
    left = 0 if config.counts_slots else left_raw(policy, sources)
    return DueSpan(start, slots, end - first, end, m, policy, queries, left, is_prompt, state.streamed)


def commit(state: RequestState, span: DueSpan) -> None:
    """The span was compressed: the raw tail begins with what it left raw."""
    if state.config.counts_slots:
        state.own = []  # everything past the anchor was merged again, together
    state.streamed, state.known_tokens = False, 0
    state.move_tail(span.start + span.closed_slots, span.closed_end, span.left)
    state.merged_tokens = span.closed_end


def keep_raw(state: RequestState, slots: int, tokens: int, cached_slots: int) -> None:
    """The raw tail up to here, (row slots, logical tokens), is closed. What of it is not among the row's first
    `cached_slots`, which the prefix cache has, stays in front of what follows."""
    state.known_tokens = 0
    private = slots - max(cached_slots, state.tail_slots)
    if private > 0:
        state.own.append((private, private))
    state.move_tail(slots, tokens)


def keep_reply(state: RequestState, committed: int, cached_slots: int) -> None:
    """The reply's tail is within its budget and stays whole."""
    if not state.config.counts_slots:
        keep_raw(state, committed, committed + state.offset, cached_slots)
    elif not state.own:
        state.tail_tokens = committed + state.offset  # looked at again after one interval


def raw_borders(state: RequestState, retracted: bool) -> list[int]:
    """Logical positions at which a released row's raw end is cut into entries of the cache. A prompt that stayed raw
    and its reply are two entries; what a compression left raw is one. The tail of a retracted request is none:
    computing it again gives its next compression all its queries."""
    borders = [state.counted_tokens] if state.carried else []
    if not borders or state.reply_start not in range(state.tail_tokens, state.counted_tokens):
        borders.append(state.reply_start)
    return [*sorted(borders), *([] if retracted else [state.logical_tokens])]
