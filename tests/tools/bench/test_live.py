"""`keepkv bench agents` on one live server: what it reports fits together. One start, small loads."""

from __future__ import annotations

import json

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.bench import servers, workloads
from keepkv_sglang.tools.server_process import ServerProcess

pytestmark = pytest.mark.server


def test_numbers_of_a_live_server_fit_together(model_path, tmp_path, monkeypatch):
    """The command on one server; then 3 more requests on the same server, decoding at once."""
    more = {}
    stop = ServerProcess.__exit__

    def before_it_stops(self, *args):
        try:
            if args[0] is None:
                servers.flush(self)
                more["calls"], more["row"] = servers.run(self, workloads.AllAtOnce(3, 200, 30), lambda: None)
        finally:
            stop(self, *args)

    monkeypatch.setattr(ServerProcess, "__exit__", before_it_stops)
    argv = ["bench", "agents", "--model", str(model_path), "--out", str(tmp_path), "--servers", "keepkv"]
    argv += ["--agents", "2", "--turns", "2", "--system", "40", "--task", "120", "--tool-result", "80", "--reply", "6"]
    assert cli.main([*argv, "--pool", "1200"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert row["errors"] == row["short_answers"] == row["retractions"] == 0 and row["requests"] == 4
    # Two sources: the answers' meta_info and the scheduler's own steps.
    prompts = sum(2 * tokens for tokens in (41 + 121 + 4, 41 + 121 + 4 + 6 + 81 + 4))
    assert row["prefill_tokens"] == round(prompts * (1 - row["hit_rate"]))
    assert 0.3 < row["hit_rate"] < 0.8 and 0 < row["compressed_share"] < 1 and row["compressions"] >= 2
    assert row["slots_held"] == pytest.approx(
        sum(turn["slots"] for turn in row["by_turn"].values()) / len(row["by_turn"])
    )
    assert row["by_turn"]["1"]["slots"] < row["by_turn"]["1"]["tokens"]
    assert 0 < row["compress_share"] <= row["hook_share"] < 1
    assert row["prefill_s"] + row["decode_step_s"] + row["compress_s"] <= row["seconds"]
    assert 1 <= row["running_mean"] <= row["running_max"] <= 2
    assert row["ttft_p50"] < row["latency_p50"] <= row["latency_p99"] <= row["seconds"]

    calls, row = more["calls"], more["row"]
    assert all(call.ok and len(call.output) == len(call.arrivals) == 30 for call in calls)
    assert all(call.arrivals == sorted(call.arrivals) for call in calls)
    assert row["prefill_tokens"] == 600 and row["running_max"] == 3 and row["compressions"] == 3
    assert row["decode_per_s"] == pytest.approx(3 * 29 / row["decode_phase_s"])
    assert row["decode_step_s"] < row["decode_phase_s"] < row["seconds"]
