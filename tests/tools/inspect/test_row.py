"""What became of each token: followed slot by slot, and held against sets of tokens that are merged one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from keepkv_sglang.tools.inspect.row import DROPPED, UNKNOWN, follow, steps
from tests.support.recorded import compression, request


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def plainly(tokens, events, layer, head):
    """[(token whose slot it is, all its tokens)], from nothing but what a compression says."""
    row = [(t, {t}) for t in range(tokens)]
    for event in events:
        kept, assign = event.kept[layer][head], event.assign[layer][head]
        start = next(slot for slot, (owner, _) in enumerate(row) if owner >= event.first)
        sources = row[start : start + event.slots]
        merged = [(sources[k][0], set()) for k in kept]
        for (_, members), number in zip(sources, assign, strict=True):
            if number >= 0:
                merged[number][1].update(members)
        row[start : start + event.slots] = merged
    return row


def agrees(head, row, tokens):
    assert head.token.tolist() == [owner for owner, _ in row]
    slot_of = {token: slot for slot, (_, members) in enumerate(row) for token in members}
    assert head.into.tolist() == [slot_of.get(token, DROPPED) for token in range(tokens)]


EVENTS = {
    "a prompt and its reply": lambda rng: [
        compression(rng, 10, 100, 20, start=10),
        compression(rng, 100, 140, 9, start=30),
        compression(rng, 140, 150, 3, start=39),
    ],
    "a budget in slots merges the merged again": lambda rng: [
        compression(rng, 10, 100, 20, start=10),
        compression(rng, 10, 140, 20, start=10, slots=60, merged_end=100),
    ],
    "heads that keep different numbers, and what follows": lambda rng: [
        ragged(rng),
        compression(rng, 100, 140, 9, start=10 + (5 + 41) // 2),
    ],
}


def ragged(rng):
    """What every head keeps is its own."""
    small, large = compression(rng, 10, 100, 5, start=10), compression(rng, 10, 100, 41, start=10)
    mixed = {
        name: [[getattr(small, name)[layer][0], getattr(large, name)[layer][1]] for layer in range(2)]
        for name in ("kept", "assign", "log_votes")
    }
    return replace(small, **mixed)


@pytest.mark.parametrize("name", EVENTS)
def test_rows_are_followed(rng, name):
    events, tokens = EVENTS[name](rng), 160
    rows = [[plainly(tokens, events, layer, head) for head in range(2)] for layer in range(2)]
    held = np.mean([len(row) for layer in rows for row in layer])
    for layer, found in enumerate(follow(request(tokens, held, events, anchor=10))):
        for number, head in enumerate(found):
            agrees(head, rows[layer][number], tokens)
            assert head.log_votes.shape == head.token.shape and not head.log_votes[:10].any()


def test_votes_are_those_of_the_last_compression_of_each_slot(rng):
    events = EVENTS["a prompt and its reply"](rng)
    head = follow(request(160, 52, events, anchor=10))[1][0]
    expected = [np.zeros(10), *(event.log_votes[1][0] for event in events), np.zeros(10)]
    np.testing.assert_array_equal(head.log_votes, np.concatenate(expected).astype(np.float32))


def test_originals_are_the_tokens_again(rng):
    """Of a history in 20 slots that the cache had, all tokens are read: nothing of it is unknown."""
    event = compression(rng, 10, 140, 25, start=10, slots=60, originals=True, merged_end=100)
    head = follow(request(150, 45, [event], anchor=10))[0][1]
    agrees(head, plainly(150, [replace(event, slots=130)], 0, 1), 150)


def test_what_the_cache_had_is_unknown_without_its_record(rng):
    before, event = compression(rng, 10, 100, 20, start=10), compression(rng, 100, 140, 9, start=30)
    cached = {"cached_compressed_tokens": 90}
    whole = request(150, 49, [event], anchor=10, earlier=[before], answer=cached)
    part = replace(whole, earlier=[])
    agrees(follow(whole)[0][0], plainly(150, [before, event], 0, 0), 150)
    head = follow(part)[0][0]
    assert (head.into[10:100] == UNKNOWN).all() and (head.token[10:30] == UNKNOWN).all()
    np.testing.assert_array_equal(head.into[100:], follow(whole)[0][0].into[100:])
    assert steps(part) == steps(whole) == [(100, 30), (140, 70), (140, 39), (150, 49)]


def test_only_the_cache_compressed(rng):
    part = request(150, 80, [], anchor=10, answer={"cached_compressed_tokens": 90})
    ((head,),) = follow(part)
    assert (head.into[10:100] == UNKNOWN).all() and len(head.token) == 80
    assert head.token[-50:].tolist() == list(range(100, 150))


def test_a_budget_in_slots_over_a_cached_history(rng):
    """Its 20 slots are sources, and whose they are is not known."""
    event = compression(rng, 10, 140, 30, start=10, slots=60, merged_end=100)
    head = follow(request(150, 50, [event], anchor=10, answer={"cached_compressed_tokens": 90}))[0][0]
    sources = [UNKNOWN] * 20 + list(range(100, 140))
    assert head.token[10:40].tolist() == [sources[k] for k in event.kept[0][0]]
    assert (head.into[10:100] == UNKNOWN).all()


def test_a_request_that_was_computed_again(rng):
    """After a retraction that lost its entries the same prompt is compressed once more: the last one counts."""
    lost, again = compression(rng, 10, 100, 20, start=10), compression(rng, 10, 100, 30, start=10)
    head = follow(request(120, 60, [lost, again], anchor=10))[0][0]
    agrees(head, plainly(120, [again], 0, 0), 120)


def test_a_step_past_the_stop(rng):
    """It was in flight, and merged: the answer counts neither token nor slot more."""
    event = compression(rng, 0, 101, 20, start=0)
    assert len(follow(request(100, 19, [event]))[0][0].into) == 101


def test_a_record_that_contradicts_the_answer(rng):
    with pytest.raises(ValueError, match=r"makes 60\.0 slots of request r, its answer says 61"):
        follow(request(100, 61, [compression(rng, 0, 50, 10, start=0)]))


def test_slots_over_time(rng):
    events = EVENTS["a prompt and its reply"](rng)
    expected = [(0, 0), (100, 100), (100, 30), (140, 70), (140, 39), (150, 49), (150, 42), (160, 52)]
    assert steps(request(160, 52, events, anchor=10)) == expected
