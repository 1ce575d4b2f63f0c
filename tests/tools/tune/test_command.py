"""`keepkv tune` on small traces: what is read, that simulator and evaluator see the same tokens, what is printed."""

from __future__ import annotations

import json
import re
from array import array
from pathlib import Path

import pytest

from keepkv_sglang import cli
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.turns import Item
from keepkv_sglang.tools.report import plots
from keepkv_sglang.tools.simulate.traces import BORDER
from keepkv_sglang.tools.tune import buys, costs, messages

PLACES = ("harbour", "station", "market", "library")


def conversation(place: str, turns: int) -> list[dict[str, str]]:
    """A system message, then turns that say something of their own."""
    said = [{"role": "system", "content": "You are the keeper of a town's records. " * 4}]
    for turn in range(turns):
        lines = [f"Record {turn}-{line}: the {place} counted {line * 7 + turn} visitors." for line in range(5)]
        said.append({"role": "user", "content": " ".join(lines)})
        said.append(
            {"role": "assistant", "content": f"The {place} counted {49 + turn} visitors at most in list {turn}."}
        )
    return said


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(place, 4)}) + "\n" for place in PLACES))
    return path


@pytest.fixture(scope="module")
def probe(model_path: Path) -> Probe:
    return Probe(str(model_path))


def test_lines_that_are_conversations_and_lines_that_are_requests(tmp_path):
    path = tmp_path / "log.jsonl"
    whole, asked = conversation("mill", 2), conversation("mill", 1)[:2]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": {}}]}]
    rows = [
        {"messages": whole},
        {"messages": asked, "reply": "Nobody.", "timestamp": 12.5},
        {"messages": [*parts, {"role": "assistant", "content": "I."}]},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert messages.is_messages(path)
    first, second, third = messages.read(path)
    assert [(len(said), follows) for said, follows in first.parts] == [(2, True), (1, False), (1, True), (1, False)]
    assert (first.time, second.time) == (None, 12.5)
    assert second.parts == [(asked, True), ([{"role": "assistant", "content": "Nobody."}], False)]
    assert third.parts[0][0] == [{"role": "user", "content": "Who?"}]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "x"}, "messages"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "there is no reply"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing comes before"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, what):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": conversation("mill", 1)}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"line 2: .*{what}"):
        messages.read(path)


def test_simulator_and_evaluator_see_the_same_tokens(probe, trace):
    talks = messages.read(trace)
    items = messages.items(probe, talks)
    work = messages.workload(probe, talks, items, every_s=10)
    assert [r.time for r in work.requests] == [0, 10, 10, 20, 20, 20, 30, 30, 30, 30, 40, 40, 40, 50, 50, 60]
    end = probe.ids("<|im_end|>")[0]
    for item in items:
        opening = array("q", [BORDER if token == end else token + 1 for token in item.turns[0][0]])
        mine = [i for i, prompt in enumerate(work.prompts) if prompt[: len(opening)] == opening]
        assert len(mine) == 4 and [work.requests[i].parent for i in mine] == [-1, *mine[:3]]
        whole = [token for turn in item.turns for part in turn for token in part]
        last = [*work.prompts[mine[3]], *work.replies[mine[3]]]
        assert [end if token == BORDER else token - 1 for token in last] == whole
        assert work.prompts[mine[0]].index(BORDER) + 1 == item.anchor == work.requests[mine[0]].first_message > 30


def test_as_many_requests_as_there_is_time_for(probe, trace):
    talks = messages.read(trace)
    work = messages.workload(probe, talks * 20, messages.items(probe, talks * 20), every_s=10)
    config = KeepKVConfig(enabled=True, budget=0.2)
    assert buys.affordable(work, 4, 1e9, config).requests == work.requests
    few = buys.affordable(work, 4, 1e-9, config)
    assert len(few.requests) == buys.FIRST < len(work.requests)
    assert all(request.parent < index for index, request in enumerate(few.requests))


def test_a_long_conversation_is_cut_and_an_empty_reply_ends_it():
    turns = (([1] * 500, [1] * 200), ([1] * 300, [1] * 24), ([1], [1]))
    assert costs.sample([Item(0, "", 0, turns)])[0].turns == turns[:2]
    first = (([1] * 5000, [1] * 120), *turns)
    assert costs.sample([Item(0, "", 0, first)])[0].turns == first[:1]
    assert costs.sample([Item(0, "", 0, (([1] * 5000, [1] * 121), *turns))]) == []
    assert costs.sample([Item(0, "", 0, (([1] * 9, []), *turns))]) == []


def test_messages_from_the_command_line(trace, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    argv = ["tune", str(trace), "--budget", "0.2", "--budget", "0.5", "--minutes", "0.05", "--pool", "500"]
    assert cli.main([*argv, "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^simulated: 16 requests, [\d,]+ prompt tokens, a pool of 500 KV slots; evaluated: \d conversations$",
        text,
        re.M,
    )
    rows = {row[0]: row[1:] for row in (re.split(" {2,}", line) for line in text.splitlines()) if len(row) > 4}
    hits = {name: float(row[0].rstrip("%")) for name, row in rows.items() if name.startswith(("stock", "budget"))}
    assert hits["stock"] + 10 < hits["budget 0.5"] < hits["budget 0.2"] <= hits["stock, any pool"]
    kl, top1 = ({b: float(rows[f"budget {b}"][at].split()[0]) for b in (0.2, 0.5)} for at in (5, 6))
    assert 0 < kl[0.5] < kl[0.2] and 0 < top1[0.2] <= top1[0.5] <= 100
    assert re.search(r"^(Use --keepkv-budget|Leave KeepKV off)", text, re.M)
    assert plot.stat().st_size > 5000 or not plots.available()


def test_a_trace_of_blocks_has_no_texts(tmp_path, capsys):
    rows = [
        {
            "timestamp": 1000 * i,
            "input_length": 2048,
            "output_length": 64,
            "hash_ids": [0, 1, 2 + 2 * (i % 6), 3 + 2 * (i % 6)],
        }
        for i in range(30)
    ]
    path = tmp_path / "blocks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["tune", str(path), "--budget", "0.2", "--plot", str(tmp_path / "plot.png")]) == 0
    text = capsys.readouterr().out
    assert "simulated: 30 requests" in text and "evaluated: 0 conversations" in text and "No KL and no top-1" in text


def test_bad_arguments(trace, capsys):
    for argv, what in ((["--budget", "1"], "below 1"), (["--minutes", "0"], "positive")):
        assert cli.main(["tune", str(trace), *argv]) == 1
        assert what in capsys.readouterr().err
