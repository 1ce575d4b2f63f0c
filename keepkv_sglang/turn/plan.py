"""What a turn will compress: decided when its row begins, and once more where a chunk is about to run."""

from __future__ import annotations

from dataclasses import dataclass

from keepkv_sglang.turn.anchor import first_message_end
from keepkv_sglang.turn.limits import Limits, Row
from keepkv_sglang.turn.queries import reserve, starts_before
from keepkv_sglang.turn.state import Planned, RequestState


@dataclass(frozen=True)
class Chain:
    """What a row begins with: the compressed spans of the prefix cache, or a history that was unpacked.

    anchor, slots, tokens: of the anchor, and of all of it. tail: where its raw end begins (slots, tokens, how many of
    these the last compression carried). unpacked: how many of the tokens are read as originals. streamed: these have no
    slots, and the row is that of the compressed spans until history and turn are compressed. known: with originals,
    where the last compression ended: what is behind is new.
    """

    anchor: int
    slots: int
    tokens: int
    tail: tuple[int, int, int]
    unpacked: int = 0
    streamed: bool = False
    known: int = 0

    @staticmethod
    def of_originals(anchor: int, tokens: int, unpacked: int, known: int) -> Chain:
        """A history of `tokens` tokens with a slot each: all behind the anchor is compressed again, with the turn."""
        return Chain(anchor, tokens, tokens, (anchor, anchor, 0), unpacked, known=known)


def begin(limits: Limits, state: RequestState, row: Row, chain: Chain | None) -> None:
    """A row is about to be written: takes over what was matched and plans the spans of this prefill."""
    state.prompt_tokens = len(row.prompt)
    state.prefill_tokens = row.total
    if chain is not None:
        anchor, slots, tokens, tail = chain.anchor, chain.slots, chain.tokens, chain.tail
        if state.compressions == 0:
            state.unpacked_tokens = chain.unpacked
            state.cached_compressed_tokens = 0 if chain.unpacked else tokens - anchor
    else:
        slots = tokens = row.prefix
        anchor = anchor_of(limits, state, row, row.prefix)
        tail = (anchor, anchor, 0)
    state.view_tail = tail
    streamed = chain is not None and chain.streamed
    if streamed:
        tail = (anchor, anchor, 0)  # all behind the anchor is compressed again, with the turn
    state.begin_row(anchor_len=anchor, prefix_tokens=tokens, prefix_slots=slots, tail=tail)
    state.streamed, state.known_tokens = streamed, chain.known if chain is not None else 0
    start = state.counted_tokens
    for end, is_prompt in state.borders(start, row.total):
        if end <= row.prefix and end < state.reply_start:
            continue  # inside what was matched: there it need not be a border of a cached span, and no queries come
        # Only tokens computed now have queries: never before the matched prefix, never before this span.
        state.plan.append(Planned(end, max(start, row.prefix), is_prompt))
        start = end


def anchor_of(limits: Limits, state: RequestState, row: Row, uncompressed: int) -> int:
    """Tokens of a row that are never compressed: what it has from SGLang's tree, and its first message."""
    return max(uncompressed, min(first_message_end(row.prompt, limits.border), state.reply_start))


def plan_chunk(limits: Limits, state: RequestState, prefix: int, end: int, too_long: bool) -> None:
    """Tokens [prefix, end) are about to run: plans what only this chunk decides, takes arena rows.

    A chunk that does not end a span is compressed at its end only when the prompt is `too_long` for the pool;
    otherwise the size of chunks does not change results.
    """
    # Shorter than min_tokens: it grows with the next chunk.
    early = state.plan and end < state.plan[0].end and end - state.counted_tokens >= state.config.min_tokens
    if early and too_long:
        queries = reserve(limits, state, max(prefix, state.counted_tokens), end, references=True)
        if queries is not None:
            state.plan.insert(0, Planned(end, prefix, is_prompt=True, queries=queries))
    for planned in state.plan:
        if planned.queries is not None or not starts_before(limits, state, planned, end, too_long):
            continue
        if planned.is_prompt or limits.room_for_replies():
            planned.queries = reserve(limits, state, max(planned.first, prefix), planned.end, planned.is_prompt)
