"""The trace simulator: hit rates worked out by hand, conservation of slots, both trace formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepkv_sglang import cli
from keepkv_sglang.runtime import process
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.places import data_folder
from keepkv_sglang.tools.report import plots
from keepkv_sglang.tools.simulate import command, report, search, traces
from keepkv_sglang.tools.simulate.replay import Result, Timing, replay
from keepkv_sglang.tools.simulate.traces import Request, Workload, link, load, tokenize
from tests.tools.unpadded import unpadded

QUARTER = KeepKVConfig(enabled=True, budget=0.25, interval=64, pressure="off")
BLOCK = 64


def request(time: float, blocks: range | tuple[int, ...], reply: int, extra: int = 0, **values: Any) -> Request:
    """A request of whole 64-token blocks and `extra` tokens, 1 s long."""
    ids = tuple(blocks)
    prompt = BLOCK * len(ids) + extra
    return Request(time, prompt, reply, ids, (ids[-1], prompt), BLOCK, seconds=1.0, first_token=0.5, **values)


def work(*requests: Request) -> Workload:
    return tokenize(link(list(requests)), scale=1)


def rates(result: Result) -> tuple[int, int]:
    assert result.cut_replies == 0
    return result.cached_tokens, result.prompt_tokens


# One conversation of two turns: 640 tokens and a reply of 129, then 1,280 tokens that begin with all of it.
TWO_TURNS = work(request(0, range(1, 11), 129), request(5, range(1, 21), 65))
TOTAL = 640 + 1280


def test_stock_hits_the_first_turn_and_its_reply() -> None:
    # The last token of a reply has no slot: 640 + 128 are cached.
    assert rates(replay(TWO_TURNS, 10_000, None)) == (768, TOTAL)


def test_keepkv_hits_as_much_with_a_quarter_of_the_slots() -> None:
    result = replay(TWO_TURNS, 10_000, QUARTER, check_every=1)
    assert rates(result) == (768, TOTAL)
    # Prompt 1, its reply at 64 and 128 generated tokens, prompt 2, its reply at 64.
    assert result.compressions == 5
    assert result.evicted_slots == 0


def test_what_is_kept_decides_what_fits() -> None:
    """Two conversations take turns. Stock's first turns are gone when the second come; merged ones are still there."""
    turns = work(
        request(0, range(1, 11), 2),
        request(5, range(101, 111), 2),
        request(10, range(1, 12), 2),
        request(15, range(101, 112), 2),
    )
    total = 2 * (640 + 704)
    # 641 slots each stay behind: two do not fit 1,000.
    assert rates(replay(turns, 1000, None)) == (0, total)
    # ceil(639 / 4) slots and one raw tail of two tokens each: both fit.
    assert rates(replay(turns, 1000, QUARTER, check_every=1)) == (2 * 641, total)


def test_a_merged_turn_matches_whole_or_not_at_all() -> None:
    """A prompt that leaves the first one after 5 of its 10 blocks: stock hits 5 blocks, one span nothing."""
    forked = work(request(0, range(1, 11), 2), request(5, (*range(1, 6), *range(50, 55)), 2))
    assert rates(replay(forked, 10_000, None)) == (320, 1280)
    assert rates(replay(forked, 10_000, QUARTER)) == (0, 1280)
    # Pieces of 128 tokens: two of them end before 320.
    assert rates(replay(forked, 10_000, replace(QUARTER, span_tokens=128))) == (256, 1280)


def test_a_raw_tail_longer_than_a_piece_is_not_cut_inside() -> None:
    """Turn 1 stays raw as two spans of 63 and 58 tokens; turn 2's pieces of 64 must not begin in the second."""
    config = replace(QUARTER, span_tokens=64)
    result = replay(work(request(0, (1,), 58), request(5, range(1, 6), 5)), 5000, config, check_every=1)
    assert rates(result) == (64 + 57, 64 + 320)
    assert result.compressions == 3  # up to 128 with the raw tail, to 192, and the rest


def test_the_first_message_is_an_anchor() -> None:
    forked = [
        request(0, range(1, 11), 2, first_message=192),
        request(5, (*range(1, 6), *range(50, 55)), 2, first_message=192),
    ]
    assert rates(replay(work(*forked), 10_000, QUARTER)) == (192, 1280)


def test_prompts_longer_than_the_pool() -> None:
    """Stock refuses them. KeepKV compresses between chunks of 8,192 tokens."""
    long = work(request(0, range(1, 401), 2), request(5, range(1, 402), 2))  # 25,600 and 25,664 tokens
    pool = 20_000
    stock = replay(long, pool, None)
    assert (stock.rejected, stock.cached_tokens, stock.admitted_tokens) == (2, 0, 0)
    ours = replay(long, pool, QUARTER, check_every=1)
    assert (ours.rejected, *rates(ours)) == (0, 25_601, 51_264)
    assert ours.peak_slots <= pool


def test_a_pool_too_small_for_anything_rejects_everything() -> None:
    for config in (None, QUARTER):
        result = replay(TWO_TURNS, 130, config)
        assert (result.rejected, result.hit_rate, result.admitted_hit_rate) == (2, 0.0, 0.0)
    with pytest.raises(ValueError, match="larger"):
        replay(TWO_TURNS, 10, None)


def test_who_does_not_fit_waits_for_its_turn() -> None:
    both = work(request(0, range(1, 11), 2), request(0.25, range(101, 111), 2))
    result = replay(both, 1000, None)
    assert (result.waited, result.waited_seconds, result.peak_requests) == (1, 0.75, 1)
    assert replay(both, 2000, None).peak_requests == 2


def test_a_turn_waits_for_the_reply_that_it_carries_on() -> None:
    early = work(request(0, range(1, 11), 129), request(0.1, range(1, 21), 65))
    assert early.requests[1].parent == 0
    assert rates(replay(early, 10_000, None)) == (768, TOTAL)


def test_recomputed_tokens_are_those_that_were_there_before() -> None:
    again = work(*(request(5 * t, range(1, 11) if t % 2 == 0 else range(101, 111), 2) for t in range(3)))
    result = replay(again, 1000, None)
    assert (result.cached_tokens, result.recomputed_tokens, result.evicted_slots > 0) == (0, 640, True)


def _mixed(scale: int = 1) -> Workload:
    """Conversations that grow, share a beginning, fork and overlap."""
    requests = [
        request(
            7 * turn + 0.3 * chat,
            (*range(1, 5), *range(1000 * chat + 5, 1000 * chat + 8 + 6 * turn)),
            40 + 31 * turn,
            extra=17 * chat % 64,
            first_message=256,
        )
        for turn in range(4)
        for chat in range(1, 6)
    ]
    return tokenize(link(requests), scale)


@pytest.mark.parametrize("pool", [700, 2500, 6000])
@pytest.mark.parametrize("config", [None, QUARTER, replace(QUARTER, pressure="merge"), replace(QUARTER, budget=200)])
def test_no_slot_is_lost_and_results_repeat(pool: int, config: KeepKVConfig | None) -> None:
    """World.check after every third event, World.flush at the end; equal but for times."""

    def numbers() -> Result:
        result = replay(_mixed(), pool, config, check_every=3)
        counters = {k: v for k, v in result.counters.items() if "seconds" not in k}
        return replace(result, microseconds={}, counters=counters, seconds=0)

    assert numbers() == numbers()
    assert process.active() is None


def test_a_larger_pool_hits_more_and_the_ceiling_is_the_most() -> None:
    hits = [replay(_mixed(), pool, QUARTER).hit_rate for pool in (1200, 2500, 100_000)]
    assert hits[0] < hits[2] == search.ceiling(_mixed(), QUARTER).hit_rate
    ideal = search.ceiling(_mixed(), None)
    assert ideal.recomputed_tokens == ideal.evicted_slots == 0


def test_half_ideal_pool() -> None:
    mixed = _mixed()
    (claim,) = search.examine(mixed, [QUARTER], timing=Timing())
    assert 0.5 <= claim.stock.hit_rate / claim.ideal.hit_rate < 0.75
    assert claim.keepkv.pool == claim.stock.pool
    assert replay(mixed, int(0.97 * claim.stock.pool), None).hit_rate < claim.ideal.hit_rate / 2


def test_scale_changes_the_resolution_only() -> None:
    fine, coarse = (replay(_mixed(scale), 100_000, None).hit_rate for scale in (1, 16))
    assert abs(fine - coarse) < 0.03
    with pytest.raises(ValueError, match="divide"):
        _mixed(5)


# -- traces -----------------------------------------------------------------------------------------------------------


def test_tokens_follow_from_ids_and_from_who_carries_on() -> None:
    two = tokenize(link([request(0, range(1, 4), 50, extra=10), request(5, range(1, 6), 7)]), 1)
    first, second = two.prompts
    assert len(first) == 202 and first == second[:202]
    assert two.replies[0] == second[202:252]
    assert len(set(two.replies[1]) | set(second)) == 7 + 320, "the last reply is unique"


def test_who_is_carried_on_must_be_plain() -> None:
    # Two prompts end in block 1; the third goes on behind one of them.
    linked = link([request(0, (1,), 50, extra=10), request(1, (1,), 50, extra=20), request(2, (1, 2, 3), 5)])
    assert [r.parent for r in linked] == [-1, -1, -1]
    # Block 1 is a system prompt: three conversations go on behind it.
    shared = [request(0, (1,), 5, extra=10), *(request(t, (1, 10 * t, 10 * t + 1), 5) for t in (1, 2, 3))]
    assert [r.parent for r in link(shared)] == [-1, -1, -1, -1]


def test_both_formats_are_read(tmp_path: Path) -> None:
    rows = [
        {"t": 3.0, "type": "s", "in": 150, "out": 9, "hash_ids": [1, 2]},
        {"t": 8.0, "type": "n", "in": 200, "out": 4, "hash_ids": [1, 2, 3], "api_time": 2.5, "ttft": 0.5},
    ]
    agent = {"id": "a", "block_size": 64, "tool_tokens": 60, "system_tokens": 10, "requests": rows}
    (tmp_path / "a.json").write_text(json.dumps(agent))
    (tmp_path / "b.json").write_text(json.dumps(agent))
    lines = [{"timestamp": 1500, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    requests = load([tmp_path.name], data=tmp_path.parent)
    assert [r.time for r in requests] == [0, 0, 0, 5, 5]
    assert [r.prompt for r in requests] == [150, 150, 600, 200, 200]
    assert [r.parent for r in requests] == [-1, -1, -1, 0, 1]
    assert requests[0].first_message == 64 and requests[3].seconds == 2.5
    assert len({b for r in requests for b in r.blocks}) == 3 + 3 + 1, "ids of two traces never meet"
    assert requests[2].blocks and requests[2].block_tokens == 512


def test_bad_traces_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace 'nonsense'"):
        load(["nonsense"], data=tmp_path)
    (tmp_path / "x.json").write_text('{"requests": []}')
    with pytest.raises(ValueError, match="neither an agent trace"):
        load([str(tmp_path / "x.json")])


def _needs(name: str) -> None:
    try:
        data_folder(holds=name)
    except ValueError as error:
        pytest.skip(str(error))


def test_agent_traces_hold_more_in_half_of_the_pool() -> None:
    _needs("agent_traces")
    sessions = tokenize(load(["agent_traces"]), 16)
    assert len(sessions.requests) == 263
    stock, ours = (replay(sessions, 400_000, config) for config in (None, replace(QUARTER, budget=0.1)))
    assert stock.rejected == ours.rejected == 0
    assert ours.hit_rate > stock.hit_rate + 0.2


def test_mooncake_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _needs("mooncake/conversation_trace.jsonl")
    out = tmp_path / "out.json"
    argv = ["simulate", "mooncake/conversation_trace.jsonl", "--limit", "200", "--pool", "0.5M", "--json", str(out)]
    assert cli.main(argv) == 0
    text = unpadded(capsys.readouterr().out)
    assert "| keepkv |" in text and "| stock |" in text
    data = json.loads(out.read_text())
    assert [(r["policy"], r["pool"], r["requests"]) for r in data["results"]] == [
        ("stock", 500_000, 200),
        ("keepkv", 500_000, 200),
    ]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--pool", "many"], ["--pool", "1", "--budget", "-1"]):
        with pytest.raises(SystemExit):
            cli.main(["simulate", "x", *argv])
    assert cli.main(["simulate", "agent_traces"]) == 1
    assert "nothing to replay" in capsys.readouterr().err
    assert (command.pool_size("400k"), command.pool_size("1.5M"), command.pool_size("77")) == (400_000, 1_500_000, 77)


def test_plot(tmp_path: Path) -> None:
    results = [replay(TWO_TURNS, pool, config) for pool in (1000, 4000) for config in (None, QUARTER)]
    path = tmp_path / "plot.png"
    if not plots.available():
        with pytest.raises(ValueError, match="pip install matplotlib"):
            report.plot(path, results, "two turns")
    else:
        report.plot(path, results, "two turns")
        assert path.stat().st_size > 5000
    assert report.table(results).count("\n") == 5
    assert traces.BORDER == 0
