"""One line a minute, and none when nothing happened."""

from __future__ import annotations

from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.runtime.summary import EVERY_S, Summary


def test_said_a_minute_after_the_first_thing_it_tells_of():
    now = 1000.0
    summary, counters = Summary(lambda: now), Counters()
    for _ in range(3):
        assert summary.look(counters) is None
        now += 2 * EVERY_S
    counters.answers, counters.answers_compressed = 2, 1
    counters.logical_tokens, counters.saved_slots = 5000, 4000
    assert summary.look(counters) is None, "the minute begins now"
    now += EVERY_S - 1
    counters.compressions, counters.seconds = 3, 0.25
    assert summary.look(counters) is None
    now += 1
    said = summary.look(counters)
    assert said is not None and said.startswith("KeepKV in 60 s: 2 requests ended, 1 of them compressed, with 1,000 ")
    assert "1,000 slots for 5,000 tokens" in said and "3 compressions in 0.25 s" in said
    assert "cold tokens" not in said and "originals" not in said
    now += 5 * EVERY_S
    assert summary.look(counters) is None, "said already"


def test_the_next_line_tells_of_what_is_new_alone():
    now = 0.0
    summary, counters = Summary(lambda: now), Counters(answers=0)
    counters.answers = 7
    summary.look(counters)
    now += EVERY_S
    assert summary.look(counters) is not None
    counters.pressure_merges, counters.pressure_tokens, counters.hit_tokens, counters.prompt_tokens = 1, 300, 40, 90
    summary.look(counters)
    now += EVERY_S
    said = summary.look(counters)
    assert said is not None and "0 requests ended" in said and "300 cold tokens merged" in said
    assert "40 of 90 prompt tokens found compressed" in said
