"""Skipped compressions are said once a minute, with what to change, and never twice."""

from __future__ import annotations

from dataclasses import fields

from keepkv_sglang.runtime.skips import ADVICE, EVERY_S, SkipWatch
from keepkv_sglang.turn.limits import Skips


def test_every_kind_has_advice():
    assert list(ADVICE) == [field.name for field in fields(Skips)]


def test_said_once_and_at_most_once_a_minute():
    now = 100.0
    watch, skips = SkipWatch(lambda: now), Skips()
    assert watch.look(skips) is None
    skips.skipped_no_window += 2
    said = watch.look(skips)
    assert said is not None and "2 because the query arena was full of prompts" in said and "KV pool" not in said
    assert watch.look(skips) is None
    skips.skipped_no_window += 1
    skips.skipped_no_room += 4
    now += EVERY_S - 1
    assert watch.look(skips) is None
    now += 1
    said = watch.look(skips)
    assert said is not None and "1 because the query arena" in said and "4 because the KV pool" in said
    now += EVERY_S
    assert watch.look(skips) is None
