"""How many slots a request will hold: what admission counts with."""

from __future__ import annotations

from collections.abc import Sequence

from keepkv_sglang.turn.anchor import first_message_end
from keepkv_sglang.turn.limits import Limits, Row
from keepkv_sglang.turn.state import RequestState


def peak_slots(limits: Limits, state: RequestState, prompt: Sequence[int], tokens: int) -> int:
    """Most slots that the last `tokens` of a prompt hold when compressed after every chunk, and one interval to decode.

    prompt: token ids. The anchor is not compressed. Chunks below min_tokens wait for the next one; each chunk rounds up
    once.
    """
    config, total = state.config, len(prompt)
    chunk = min(limits.chunk_tokens, tokens)
    anchor = first_message_end(prompt, limits.border)
    anchor = max(0, min(anchor - (total - tokens), tokens))
    rest = max(1, tokens - anchor)
    held = state.slots_for(total - rest, total)
    if config.counts_slots:
        held += max(0, held - chunk)  # merging the chain again needs fresh slots beside the old ones
    else:
        held += rest // max(1, chunk) + 1
    return anchor + held + config.min_tokens + chunk + config.interval


def later_slots(limits: Limits, state: RequestState, row: Row, extend: int, new_tokens: int, taken: int = 0) -> int:
    """Slots to reserve beyond the `extend` prompt tokens about to be computed, for `new_tokens` of reply; negative
    where the compression of the prompt, which comes before the next decode step, gives back more than the reply takes.

    taken: arena rows promised to others that are admitted in the same round.
    """
    if not state.admitted and limits.arena.free_rows - taken < limits.queries_of(state.config):
        return new_tokens  # no room for its queries: nothing of it will be compressed
    if state.admitted:  # a later chunk: the turn began before it
        turn = row.total - state.counted_tokens
    else:
        turn = extend - max(0, first_message_end(row.prompt, limits.border) - row.prefix)
    prompt, config = turn - 1, state.config  # the last prompt token belongs to the reply
    if prompt < config.min_tokens:
        return state.reply_growth(new_tokens)
    end = row.total - 1
    kept = state.slots_for(end - prompt, end)
    if config.span_tokens and not config.counts_slots:
        kept += prompt // config.span_tokens
    later = state.reply_growth(new_tokens) - max(0, prompt - kept)
    # Pieces of a cut prompt, and a reply computed again, may find no arena rows of their own and stay whole.
    return max(0, later) if config.span_tokens or row.resumed else later
