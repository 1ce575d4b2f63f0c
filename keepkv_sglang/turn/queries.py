"""Which queries a compression scores with, and the arena rows that hold them until then.

A prompt's span takes rows when the chunk begins that computes its queries; a reply takes them as late as possible.
"""

from __future__ import annotations

from bisect import bisect_left

from keepkv_sglang.turn.limits import Limits
from keepkv_sglang.turn.state import LOST, Planned, QueryRows, RequestState

Captured = tuple[list[int], list[int]]  # (rows of a forward's query tensor, arena rows), pairwise


def reference_positions(first: int, stop: int, count: int) -> list[int]:
    """At most `count` logical positions of [first, stop), ascending, evenly spread; all of them when fewer."""
    length = max(0, stop - first)
    count = min(count, length)
    return [first + i * length // count for i in range(count)]


def reserve(limits: Limits, state: RequestState, first: int, end: int, references: bool) -> QueryRows | None:
    """Arena rows for the last queries before `end`, and for reference queries from `first` on if asked for; None: there
    are none from `first` on, or the arena is full."""
    lo = max(first, end - state.config.window)
    if lo >= end:
        return None
    spread = reference_positions(first, lo, limits.queries_of(state.config) - state.config.window) if references else []
    positions = [*spread, *range(lo, end)]
    # A prompt in many pieces holds rows for each until its end: never more than half of what all requests share.
    held = sum(len(planned.queries.rows) for planned in state.plan if planned.queries is not None)
    arena = limits.arena
    rows = arena.take(len(positions)) if held == 0 or 2 * (held + len(positions)) <= arena.rows else None
    if rows is None:
        limits.skips.skipped_no_window += 1
        return None
    return QueryRows(positions, rows, len(spread))


def starts_before(limits: Limits, state: RequestState, planned: Planned, end: int, too_long: bool) -> bool:
    """Whether queries that the planned span needs come before `end`, the end of the chunk that is about to run."""
    spread = planned.is_prompt and limits.queries_of(state.config) > state.config.window
    # A prompt that is compressed between chunks has references from the chunk that ends it.
    first = planned.first if spread and not too_long else planned.end - state.config.window
    return end > first


def capture(limits: Limits, state: RequestState, start: int, end: int, out: Captured, at: int) -> None:
    """Tokens [start, end) (logical) run in this forward, at rows [at, ...) of its query tensor.

    Appends to out (query rows, arena rows) those that a planned or coming compression scores with.
    """
    for planned in state.plan:
        if planned.queries is not None:
            _capture(planned.queries, start, end, out, at)
    if end > state.reply_start:
        _open_reply(limits, state, start, end)
        if state.reply_queries is not None:
            _capture(state.reply_queries, start, end, out, at)


def _open_reply(limits: Limits, state: RequestState, start: int, end: int) -> None:
    """Queries of the last tokens before the next compression of the reply."""
    if state.reply_queries is not None:
        return
    base = state.plan[-1].end if state.plan else state.interval_start  # where what is new will begin
    due = base + state.config.interval
    count = limits.reply_rows(state.config)
    if end <= due - count:
        return
    lo = max(start, due - count)
    rows = limits.arena.take(due - lo if due > lo else count) if limits.room_for_replies() else None
    if rows is not None:
        state.reply_queries = QueryRows(range(lo, lo + len(rows)), rows)
    elif state.reply_skipped != due:
        state.reply_skipped = due
        limits.skips.skipped_reply_window += 1


def _capture(queries: QueryRows, start: int, end: int, out: Captured, at: int) -> None:
    lo, hi = bisect_left(queries.positions, start), bisect_left(queries.positions, end)
    if lo >= hi:
        return
    if lo != queries.filled:
        queries.filled = LOST
        return
    out[0].extend(at + position - start for position in queries.positions[lo:hi])
    out[1].extend(queries.rows[lo:hi])
    queries.filled = hi


def release(limits: Limits, planned: Planned) -> None:
    """The span is done with: its rows go back."""
    if planned.queries is not None:
        limits.arena.give_back(planned.queries.rows)
        planned.queries = None


def release_reply(limits: Limits, state: RequestState) -> None:
    """The same of the reply's."""
    if state.reply_queries is not None:
        limits.arena.give_back(state.reply_queries.rows)
        state.reply_queries = None


def drop_plan(limits: Limits, state: RequestState) -> None:
    """Nothing more of the request is compressed as planned; its arena rows go back."""
    limits.arena.give_back(state.drop_queries())
    state.plan = []
