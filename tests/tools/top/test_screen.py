"""What `keepkv top` shows of answers that a real server gave once (canned.json), and of what it was told of votes."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from keepkv_sglang.tools.remote import OffError
from keepkv_sglang.tools.top.reading import reading_of, votes_of
from keepkv_sglang.tools.top.screen import rows, view

CANNED: dict[str, Any] = json.loads((Path(__file__).parent / "canned.json").read_text())
URL = "http://127.0.0.1:30000"


def read(change=lambda info: None, **more):
    info = deepcopy(CANNED["server_info"])
    change(info)
    return replace(reading_of(URL, info, CANNED["loads"], {1.0: 60.0, 4.0: 30.0, 16.0: 10.0}), **more)


def shown(now, before=None, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(view(now, before, "the note"))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def text_of(now, label: str, before=None) -> str:
    (text,) = [text for name, _, text in rows(now, before) if name == label]
    return text


def test_one_line_each_in_80_columns():
    now = read()
    lines = shown(now)
    assert len(lines) == 2 + len(rows(now, None)) and max(map(len, lines)) <= 80
    assert lines[0] == "KeepKV  SmolLM2-135M-Instruct  http://127.0.0.1:30000" and lines[-1] == "the note"


def test_large_numbers_and_long_names_break_no_line():
    """Ten million times as much of everything: a long row goes on below itself, in its column."""

    def much(info):
        info["served_model_name"] = "a-model/" + "with-a-very-long-name-" * 4
        state = info["internal_states"][0]["keepkv"]
        for part in (state["counters"], state["memory"], state, state["originals"]):
            part.update({key: value * 10**7 for key, value in part.items() if isinstance(value, int | float)})

    assert max(map(len, shown(read(much), read(much, when=0.0)))) <= 80


def test_the_numbers_are_those_of_the_answers():
    now = read()
    state = CANNED["server_info"]["internal_states"][0]["keepkv"]
    c = state["counters"]
    assert f"{c['answers']}: {c['answers_compressed']} compressed" in text_of(now, "Ended")
    held = c["logical_tokens"] - c["saved_slots"]
    assert text_of(now, "Slots").startswith(f"{held:,} for {c['logical_tokens']:,} tokens")
    assert text_of(now, "Cache") == f"{state['entries']} spans in {state['entry_slots']:,} slots"
    share = 100 * 4 / (4 + c["compressions"])
    assert text_of(now, "Skipped") == f"{share:.0f} % of what was due: arena full of prompts 4"
    assert "1 parked" in text_of(now, "Pressure") and text_of(now, "Errors") == "none"
    assert text_of(now, "Votes") == "median at most 1, 90th percentile at most 4"
    many = replace(now, votes={1.0: 80.0, 128.0: 9.0, float("inf"): 11.0})
    assert text_of(many, "Votes") == "median at most 1, 90th percentile over 128"
    used = state["total_slots"] - state["available_slots"] - state["evictable_slots"]
    assert text_of(now, "Pool").startswith(f"{used:,} of {state['total_slots']:,} in use")


def test_rates_come_from_two_readings():
    before = read(when=100.0)
    now = read(when=110.0, counters={**before.counters, "answers": before.counters["answers"] + 5})
    assert text_of(now, "Requests", before).endswith("0.5 ended/s")
    assert "/s" not in text_of(now, "Requests")


def test_ranks_of_data_parallelism_are_added_up():
    def twice(info):
        info["internal_states"] *= 2

    one, two = read(), read(twice)
    assert two.counters["compressions"] == 2 * one.counters["compressions"]
    assert two.state["arena_rows"] == 2 * one.state["arena_rows"]
    assert text_of(two, "Skipped") == text_of(one, "Skipped").replace("prompts 4", "prompts 8")


def test_what_is_not_on_says_so():
    def bare(info):
        del info["internal_states"][0]["keepkv"]["originals"]

    now = read(bare, votes={})
    assert text_of(now, "Host tier") == "off" and text_of(now, "Votes") == "only with --enable-metrics"


def test_a_server_that_has_done_nothing_yet():
    def new(info):
        counters = info["internal_states"][0]["keepkv"]["counters"]
        counters.update(dict.fromkeys(counters, 0))

    assert text_of(read(new), "Slots") == "0 for 0 tokens" and shown(read(new))


def test_without_keepkv_it_is_an_error_that_says_what_to_do():
    with pytest.raises(OffError, match="--enable-keepkv"):
        reading_of(URL, {"internal_states": [{}]}, {})


def test_votes_are_added_up_over_ranks():
    lines = ["# TYPE keepkv:slot_votes_total counter"]
    for rank in (0, 1):
        for gt, le, count in (("0", "1", 5), ("1", "2", 7), ("64", "+Inf", 1)):
            lines.append(f'keepkv:slot_votes_total{{gt="{gt}",le="{le}",tp_rank="{rank}"}} {count}')
    assert votes_of("\n".join(lines) + "\n") == {1.0: 10.0, 2.0: 14.0, float("inf"): 2.0}
