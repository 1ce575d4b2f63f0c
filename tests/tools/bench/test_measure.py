"""The arithmetic of `keepkv bench`: rates, the decode phase, agreement, paired ratios."""

from __future__ import annotations

import math

import pytest

from keepkv_sglang.tools.bench import measure, report
from keepkv_sglang.tools.bench.client import Call
from tests.tools.unpadded import unpadded


def call(arrivals: list[float], *, prompt: int = 10, sent: float = 0.0, turn: int = 0, **meta: object) -> Call:
    return Call(0, turn, list(range(prompt)), len(arrivals), sent, arrivals, list(range(len(arrivals))), dict(meta))


def test_summary_of_two_requests_and_a_failed_one():
    keepkv = {"cached_compressed_tokens": 6, "slots_held": 5}
    calls = [
        call([1.0, 1.5, 2.0], cached_tokens=0, num_retractions=1),
        call([2.0, 4.0], sent=1.0, cached_tokens=8, keepkv=keepkv),
        Call(2, 0, [1], 3, error="HTTP 400"),
    ]
    calls[1].new_tokens = 3
    out = measure.summarise(calls, 4.0, {}, {})
    assert (out["requests"], out["errors"], out["short_answers"], out["retractions"]) == (3, 1, 1, 1)
    assert out["requests_per_s"] == 0.5 and out["generated_per_s"] == 5 / 4
    assert out["hit_rate"] == 8 / 20 and out["compressed_share"] == 6 / 8
    # The last token of an answer has no slot yet. The first request is of a server without KeepKV: all its tokens.
    assert out["slots_held"] == (12 + 5) / 2 and out["slots_per_token"] == (12 + 5) / (12 + 11)
    assert out["ttft_p50"] == 1.0 and out["latency_p50"] == 2.5 and out["gap_p50"] == 0.5 and out["gap_p99"] > 1.9


def test_the_decode_phase_is_the_wall_clock_without_prefill_forwards():
    before = {"step_times": {"prefill": {"2": [5, 1.0, 100]}, "decode": {"4": [10, 2.0, 40]}}}
    after = {
        "step_times": {
            "prefill": {"2": [6, 3.0, 150], "1": [1, 0.5, 20]},
            "decode": {"4": [10, 2.0, 40], "8": [30, 3.0, 240], "2": [10, 0.5, 20], "0": [4, 0.1, 0]},
        },
        "keepkv": {"counters": {"hook_seconds": 0.9, "seconds": 0.8, "compressions": 3, "pressure_seconds": 0.1}},
    }
    out = measure.steps(10.0, 250, before, after)
    assert out["prefill_s"] == 2.5 and out["prefill_tokens"] == 70
    assert out["decode_phase_s"] == 7.5 and out["decode_per_s"] == 250 / 7.5
    # Steps before the run do not count, nor those that held ended requests only.
    assert out["running_mean"] == (30 * 8 + 10 * 2) / 40 and out["running_max"] == 8
    assert out["decode_step_s"] == pytest.approx(3.6) and out["decode_step_per_s"] == pytest.approx(250 / 3.6)
    assert out["compress_s"] == pytest.approx(0.9) and out["compress_share"] == pytest.approx(0.09)
    assert out["hook_share"] == pytest.approx(0.1) and out["compressions"] == 3


def test_agreement_counts_only_equal_prompts():
    calls = [call([1, 2, 3, 4], prompt=3), call([1, 2], prompt=4), call([1, 2, 3], prompt=5)]
    reference = {(0, 1, 2): [0, 1, 9, 3], tuple(range(4)): [0, 1], (8,): [0]}
    out = measure.agreement(calls, reference)
    # Two of four before the first difference, what comes after it does not count; the second one is identical.
    assert out == {"compared": 2, "agreed": 0.75, "first_token": 1.0, "identical": 0.5}
    assert math.isnan(measure.agreement(calls, {})["agreed"])


def test_turns_are_means_over_agents():
    calls = [call([1.0], turn=0), call([3.0], turn=0), call([2.0], turn=1, cached_tokens=5, keepkv={"slots_held": 4})]
    out = measure.by_turn(calls)
    assert out["0"] == {"seconds": 2.0, "slots": 10, "tokens": 10, "hit_rate": 0}
    assert out["1"] == {"seconds": 2.0, "slots": 4, "tokens": 10, "hit_rate": 0.5}


def rows(values: dict[tuple[int, str], list[float]]) -> list[dict]:
    return [
        {"pool": pool, "server": server, "repeat": i, "requests_per_s": value}
        for (pool, server), group in values.items()
        for i, value in enumerate(group)
    ]


def test_ratios_pair_runs_of_one_repeat_and_pool():
    made = rows({(100, "stock"): [1, 2, 4], (100, "keepkv"): [3, 4, 20], (50, "keepkv"): [9], (50, "stock"): [3]})
    assert report.paired(made, "requests_per_s", "stock") == [(100, "keepkv", [3, 2, 5]), (50, "keepkv", [3])]
    text = unpadded(report.ratios(made, {"requests/s": "requests_per_s"}, "stock"))
    assert "| 100 | keepkv | 3.00x (2.00–5.00) |" in text
    assert report.ratios(rows({(1, "keepkv"): [1]}), {"x": "requests_per_s"}, "stock") == ""


def test_medians_leave_out_what_does_not_apply():
    made = rows({(100, "a"): [1, math.nan, 3]})
    assert report.middle(made, "requests_per_s") == 2 and math.isnan(report.middle(made, "nothing"))
    assert "–" in report.table(made, {"x": ("nothing", report._percent)})
