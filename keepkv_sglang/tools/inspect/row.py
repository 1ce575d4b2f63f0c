"""From a request's compressions to what became of each of its tokens, head by head: the row is followed from its first
slot on.

Heads are independent, and each may have its own number of slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keepkv_sglang.tools.inspect.records import Compression, Request

DROPPED, UNKNOWN = -1, -2


@dataclass
class Head:
    """One kv head of one layer.

    into int64 [tokens]: the slot that holds each token, DROPPED, or UNKNOWN: another request compressed it. token int64
    [slots]: whose slot it is, or UNKNOWN. log_votes float32 [slots]: how many tokens it stands for in attention.
    """

    into: np.ndarray
    token: np.ndarray
    log_votes: np.ndarray

    @staticmethod
    def raw(tokens: int) -> Head:
        """A slot for each token."""
        return Head(np.arange(tokens), np.arange(tokens), np.zeros(tokens, np.float32))

    def merge(self, event: Compression, layer: int, head: int) -> None:
        """One compression of this head. Its row begins as it was found (_found)."""
        kept, assign = event.kept[layer][head].astype(np.int64), event.assign[layer][head].astype(np.int64)
        start = self.slots_before(event.first)
        stop = start + len(assign)
        inside, behind = (self.into >= start) & (self.into < stop), self.into >= stop
        joined = assign[self.into[inside] - start]
        self.into[behind] += len(kept) - len(assign)
        self.into[inside] = np.where(joined >= 0, joined + start, DROPPED)
        self.token = np.concatenate((self.token[:start], self.token[start:stop][kept], self.token[stop:]))
        votes = (self.log_votes[:start], event.log_votes[layer][head], self.log_votes[stop:])
        self.log_votes = np.concatenate(votes)

    def assume(self, first: int, end: int, slots: int | None) -> None:
        """Tokens [first, end) are in `slots` slots that are not known, None: in a slot each."""
        low, high = self.slots_before(first), self.slots_before(end)
        new = np.full(slots, UNKNOWN) if slots is not None else np.arange(first, end)
        self.into[self.into >= high] += len(new) - (high - low)
        self.into[first:end] = UNKNOWN if slots is not None else low + np.arange(end - first)
        self.token = np.concatenate((self.token[:low], new, self.token[high:]))
        self.log_votes = np.concatenate((self.log_votes[:low], np.zeros(len(new), np.float32), self.log_votes[high:]))

    def slots_before(self, position: int) -> int:
        """Slots of the tokens before a logical position; it is no position inside a merged part of the row."""
        behind = self.into[position:]
        first = [int(behind[behind >= 0].min())] if (behind >= 0).any() else []
        if (behind == UNKNOWN).any():
            first.append(int(np.argmax(self.token == UNKNOWN)))
        return min(first, default=len(self.token))


def _found(heads: list[Head], event: Compression, anchor: int) -> None:
    """The row as this compression found it. It need not go on from the last one: its beginning may come from the prefix
    cache, and a request that was retracted is computed again. What a row has is a mean over heads. anchor: first tokens
    of the row that are never compressed."""

    def slots_before(position: int) -> float:
        return float(np.mean([head.slots_before(position) for head in heads]))

    if abs(slots_before(event.first) - event.start) > 0.5:
        for head in heads:
            fresh = Head.raw(len(head.into))
            head.into, head.token, head.log_votes = fresh.into, fresh.token, fresh.log_votes
            if event.start < event.first:
                head.assume(anchor, event.first, event.start - anchor)
    as_expected = abs(slots_before(event.end) - event.start - event.slots) <= 0.5
    if event.originals or not as_expected:
        for head in heads:
            head.assume(event.first, event.end, None)
    if not event.originals and not as_expected and event.slots < event.end - event.first:
        # A budget in slots: what the cache had is compressed again, with the raw slots behind it.
        merged = max(event.first, event.merged_end)
        for head in heads:
            head.assume(event.first, merged, event.slots - (event.end - merged))


def follow(request: Request) -> list[list[Head]]:
    """[layer][head] at the end of the request, of as many tokens as the model read: with the step that was in flight
    when it stopped, they may be more than the answer's. ValueError where it is not what the answer says."""
    answer, first = request.answer, request.compressions[0] if request.compressions else None
    if "logical_tokens" not in answer:
        raise ValueError(f"the answer of request {request.rid} has no numbers: {answer.get('reason')}")
    tokens = max([answer["logical_tokens"], *(event.end for event in request.compressions)])
    held = answer["slots_held"] + tokens - answer["logical_tokens"]
    heads = [[Head.raw(tokens) for _ in layer] for layer in first.kept] if first else [[Head.raw(tokens)]]
    if first is None and held < tokens:  # nothing of it was compressed, and the prefix cache had compressed slots
        cached = answer["cached_compressed_tokens"]
        heads[0][0].assume(request.anchor, request.anchor + cached, held - (tokens - cached))
    for event in (*request.earlier, *request.compressions):
        _found([head for row in heads for head in row], event, request.anchor)
        for layer, row in enumerate(heads):
            for number, head in enumerate(row):
                head.merge(event, layer, number)
    mean = np.mean([len(head.token) for row in heads for head in row])
    if abs(mean - held) > 0.5:
        raise ValueError(f"the record makes {mean:.1f} slots of request {request.rid}, its answer says {held}")
    return heads


def steps(request: Request) -> list[tuple[int, float]]:
    """(tokens computed, slots held, a mean over heads): corners of the line from where the request began to its end."""
    tokens, held = request.answer["logical_tokens"], request.answer["slots_held"]
    cached = request.answer["cached_compressed_tokens"]
    events = request.compressions
    saved = events[0].first - events[0].start if events else tokens - held
    begin = request.anchor + cached if saved else 0
    corners: list[tuple[int, float]] = [(begin, begin - saved)]
    for event in events:
        m = float(np.mean([len(kept) for layer in event.kept for kept in layer]))
        behind = event.computed - event.end
        corners += [(event.computed, event.start + slots + behind) for slots in (event.slots, m)]
    return [*corners, (tokens, held)]
