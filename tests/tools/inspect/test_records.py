"""What is taken for the beginning of a row: earlier compressions, only where slots and tokens are those."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from keepkv_sglang.tools.inspect import records
from keepkv_sglang.tools.inspect.row import UNKNOWN, follow
from tests.support.recorded import compression

SLOTS = np.arange(500, 530)  # of the pool: 10 of the anchor, 20 of the first turn's result


def save(folder, sequence, event, rank=0):
    """A compression's file as runtime/record.py writes it; head by head in `event`, all of one size."""
    stacked = {
        name: torch.tensor(np.array([[getattr(event, field)[layer][head] for head in range(2)] for layer in range(2)]))
        for name, field in (("kept", "kept"), ("assign", "assign"), ("lv", "log_votes"))
    }
    stacked["lv"] = stacked["lv"].transpose(1, 2).contiguous()
    facts = {
        "rid": event.rid,
        "rank": rank,
        "start": event.start,
        "slots": event.slots,
        "tokens": event.end - event.first,
        "end": event.end,
        "m": stacked["kept"].shape[2],
        "left": event.end - event.closed,
        "originals": event.originals,
        "merged_tokens": event.merged_end,
        "row_tokens": event.computed,
        "before": torch.tensor(event.before, dtype=torch.int32),
        "target": torch.tensor(event.target, dtype=torch.int32),
    }
    name = f"{'rank1-' if rank else ''}{sequence:05d}-{event.rid}.pt"
    torch.save(stacked | facts, folder / name)


def answered(folder, sequence, rid, tokens, held, compressions, cached):
    answer = {"logical_tokens": len(tokens), "slots_held": held, "cached_compressed_tokens": cached}
    data = {"rid": rid, "time": sequence, "tokens": tokens, "prompt_tokens": len(tokens), "anchor": 10, "protected": []}
    more = {"config": {}, "answer": {**answer, "compressions": compressions}}
    (folder / f"{sequence:05d}-{rid}.json").write_text(json.dumps({**data, **more}))


@pytest.fixture
def turns(tmp_path):
    """Two turns: tokens [10, 100) became 20 slots in the first, [100, 140) 9 in the second."""
    rng = np.random.default_rng(3)
    first = replace(compression(rng, 10, 100, 20, start=10), rid="one", before=SLOTS[:10], target=SLOTS[10:])
    second = replace(compression(rng, 100, 140, 9, start=30), rid="two", before=SLOTS, target=np.arange(9))
    save(tmp_path, 0, first)
    answered(tmp_path, 1, "one", list(range(110)), 40, 1, 0)
    save(tmp_path, 2, second)
    answered(tmp_path, 3, "two", list(range(150)), 49, 1, 90)
    return tmp_path, first, second


def test_the_turn_before_is_found(turns):
    folder, first, second = turns
    request = records.read([folder])
    assert request.rid == "two" and [event.rid for event in request.earlier] == ["one"]
    for name in ("kept", "assign", "log_votes"):
        for found, saved in ((request.earlier[0], first), (request.compressions[0], second)):
            np.testing.assert_array_equal(getattr(found, name), getattr(saved, name))
    assert not any((head.into == UNKNOWN).any() for layer in follow(request) for head in layer)


def test_slots_that_have_moved_are_not_its_result(turns):
    """It was evicted, and compressed again where nothing was recorded."""
    folder, _, second = turns
    save(folder, 2, replace(second, before=SLOTS + np.eye(30, dtype=int)[29]))
    request = records.read([folder])
    assert request.earlier == [] and (follow(request)[0][0].into[10:100] == UNKNOWN).all()


def test_the_same_slots_of_another_text_are_not(turns):
    folder, *_ = turns
    answered(folder, 1, "one", [*range(99), 7, *range(100, 110)], 40, 1, 0)
    assert records.read([folder]).earlier == []


def test_the_last_who_wrote_the_slots_counts(turns):
    folder, first, _ = turns
    again = compression(np.random.default_rng(4), 10, 100, 20, start=10)
    save(folder, 1, replace(again, rid="eno", before=first.before, target=first.target))
    answered(folder, 2, "eno", list(range(105)), 35, 1, 0)
    assert [event.rid for event in records.read([folder]).earlier] == ["eno"]


def test_what_was_left_raw_belongs_to_the_next(turns):
    """The first turn's last 5 tokens kept a slot each and are in the second's span."""
    folder, first, _ = turns
    rng = np.random.default_rng(5)
    save(folder, 0, replace(first, closed=95))
    second = compression(rng, 95, 140, 12, start=25)
    save(folder, 2, replace(second, rid="two", before=SLOTS[:25], target=np.arange(12)))
    answered(folder, 3, "two", list(range(150)), 47, 1, 85)
    request = records.read([folder])
    assert request.earlier[0].closed == 95 and len(request.earlier[0].target) == 15
    assert len(follow(request)[1][1].token) == 47


def test_the_heads_of_all_ranks(turns):
    folder, _, second = turns
    save(folder, 2, second, rank=1)
    save(folder, 4, second, rank=1)
    with pytest.raises(ValueError, match=r"ranks \[0, 1\] recorded different numbers"):
        records.read([folder])
    (folder / "rank1-00004-two.pt").unlink()
    request = records.read([*folder.glob("*two*")])
    assert len(request.compressions[0].kept[0]) == 4
    np.testing.assert_array_equal(request.compressions[0].kept[1][3], second.kept[1][1])
