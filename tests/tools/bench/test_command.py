"""`keepkv bench agents` against a stand-in server: options, workloads, order of runs, what is written."""

from __future__ import annotations

import argparse
import itertools
import json

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.agent_load import AgentLoad
from keepkv_sglang.tools.bench import command, servers, serving, workloads
from keepkv_sglang.tools.simulate.traces import Request, tokenize


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["agents", *argv])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--servers", "stock,vllm"], "at most once"),
        (["--servers", "stock,stock"], "at most once"),
        (["--repeat", "0"], "--repeat"),
        (["--budget", "2.5"], "budget"),
        (["--turns", "0"], "--turns"),
        (["--workload", "decode", "--at-once", "-1"], "--at-once"),
        (["--workload", "traces", "--speed", "0"], "--speed"),
        (["--workload", "traces", "--trace", "no-such-trace"], "no-such-trace"),
        (["--workload", "decode", "--prompt", "9000"], "context"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_bad_options_are_one_line(argv, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')
    code = cli.main(["bench", "agents", "--model", str(tmp_path), "--out", str(tmp_path / "out"), *argv])
    error = capsys.readouterr().err.strip()
    assert code == 1 and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_servers_and_flags():
    assert command.server_names(options()) == ["stock", "keepkv"]
    assert command.server_names(options("--workload", "short")) == ["disabled", "keepkv"]
    assert command.server_names(options("--host", "4")) == ["stock", "keepkv", "originals"]
    assert command.server_names(options("--budget1", "--disabled")) == ["stock", "keepkv", "budget1", "disabled"]
    setup = servers.Setup("M", "0.1", extra=("--x",), keepkv_flags=("--keepkv-scorer", "knorm"))
    assert setup.flags("stock", 7) == ["--model-path", "M", "--max-total-tokens", "7", "--x"]
    assert setup.flags("keepkv", 7)[5:] == ["--enable-keepkv", "--keepkv-budget", "0.1", "--keepkv-scorer", "knorm"]
    assert "--enable-keepkv" not in setup.flags("disabled", 7)
    with pytest.raises(ValueError, match="no server is called"):
        setup.flags("other", 7)
    assert [servers.order("ab", r) for r in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_agents_feed_replies_back(fake):
    load = AgentLoad(agents=2, turns=3, system=20, task=30, tool_result=10, reply=4)
    calls = workloads.Agents(load).run(fake.port, lambda: None)
    assert len(calls) == 6 and all(call.ok and len(call.arrivals) == 4 for call in calls)
    for agent in range(2):
        mine = sorted((call for call in calls if call.agent == agent), key=lambda call: call.turn)
        for before, after in itertools.pairwise(mine):
            assert after.prompt[: len(before.prompt) + 4] == before.prompt + before.output
        assert len(mine[-1].prompt) + 4 == load.context == workloads.Agents(load).longest


def test_a_refused_request_ends_its_agent(fake):
    load = AgentLoad(agents=1, turns=3, system=20, task=30, tool_result=10, reply=4)
    fake.refuse_longer_than = 60
    calls = workloads.Agents(load).run(fake.port, lambda: None)
    assert [call.ok for call in calls] == [True, False] and "HTTP 400" in calls[1].error


def test_a_server_that_is_gone_is_an_error_not_a_crash(fake):
    fake.http.shutdown()
    fake.http.server_close()
    (call,) = workloads.AllAtOnce(1, 5, 2).run(fake.port, lambda: None)
    assert not call.ok and call.error


def test_all_at_once_is_the_same_for_every_server(fake):
    load = workloads.AllAtOnce(5, 12, 3, at_once=2, seed=1)
    first, second = (load.run(fake.port, lambda: None) for _ in range(2))
    assert [call.prompt for call in first] == [call.prompt for call in second] and len(fake.asked) == 10
    assert len({tuple(call.prompt) for call in first}) == 5 and load.longest == 15


def test_a_trace_keeps_its_prefixes_and_its_order(fake):
    requests = [
        Request(0.0, 128, 30, (1, 2), (2, "agent", 128), 64, first_message=64),
        Request(1.0, 192, 10, (1, 2, 3), (3, "agent", 192), 64, first_message=64, parent=0),
        Request(0.0, 64, 10, (9,), (9, "agent", 64), 64),
    ]
    load = workloads.Replay(tokenize(requests, 8), speed=100.0, max_reply=2)
    calls = load.run(fake.port, lambda: None)
    assert [len(call.prompt) for call in calls] == [16, 24, 8] and load.longest == 26
    assert calls[1].prompt[:16] == calls[0].prompt and calls[0].prompt[7] == 2  # the end of the first message
    assert calls[1].sent >= calls[0].arrivals[-1]
    assert [len(call.output) for call in calls] == [2, 2, 2]
    ordinary = [token for call in calls for token in call.prompt if token != 2]
    assert min(ordinary) >= 1000 and max(ordinary) < 40_000


def test_a_benchmark_writes_its_report(fake, tmp_path, monkeypatch, capsys):
    """Two pools, two repeats: the full cache in the ample pool runs first, then the order turns round."""
    started = []

    def start(self, name, pool):
        started.append((pool, name))
        return fake

    monkeypatch.setattr(servers.Setup, "start", start)
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out"
    argv = [*("--workload", "synthetic", "--agents", "2", "--turns", "2", "--task", "20", "--system", "10")]
    argv += [*("--tool-result", "5", "--reply", "3", "--pool", "100", "--pool", "2k", "--repeat", "2")]
    assert cli.main(["bench", "agents", "--model", str(tmp_path), "--out", str(out), *argv]) == 0
    assert started == [
        *((2000, "stock"), (2000, "keepkv"), (2000, "keepkv"), (2000, "stock")),
        *((100, "stock"), (100, "keepkv"), (100, "keepkv"), (100, "stock")),
    ]
    assert fake.flushed == len(started)
    text = (out / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out and "## Beside stock" in text and "## By turn" in text
    data = json.loads((out / "results.json").read_text())
    assert len(data["runs"]) == 8 and data["settings"]["workload"] == "synthetic"
    # The stand-in answers the same everywhere, so every output is that of the full cache.
    assert all(run["compared"] == 4 and run["identical"] == 1.0 and run["errors"] == 0 for run in data["runs"])
    assert data["runs"][0]["compressed_share"] == 0.0 and data["runs"][0]["hit_rate"] > 0.4


def test_errors_of_servers_with_keepkv_fail_the_benchmark(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(servers.Setup, "start", lambda self, name, pool: fake)
    monkeypatch.setattr(servers, "warm_up", lambda server: None)
    (tmp_path / "config.json").write_text("{}")
    fake.refuse_longer_than = 5
    argv = ["bench", "agents", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--workload", "decode"]
    argv += ["--requests", "2", "--prompt", "10", "--generate", "2"]
    assert cli.main([*argv, "--servers", "keepkv"]) == 1
    assert cli.main([*argv, "--servers", "stock"]) == 0  # stock refuses what is longer than its pool: a result


def test_numbers_of_bench_serving_get_our_names():
    load = workloads.AllAtOnce(4, 10, 5)
    result = {"completed": 3, "duration": 2.0, "total_output_tokens": 15, "request_throughput": 1.5}
    result |= {"output_throughput": 7.5}
    for name in ("ttft", "e2e_latency", "itl"):
        result |= {f"{word}_{name}_ms": 250.0 for word in ("median", "p90", "p99")}
    after = {"step_times": {"prefill": {"1": [3, 0.5, 30]}, "decode": {"3": [4, 1.0, 12]}}}
    out = serving.numbers(result, load, {}, after)
    assert out["errors"] == 1 and out["ttft_p90"] == out["gap_p50"] == out["latency_p99"] == 0.25
    assert out["decode_per_s"] == 12 / 1.5 and out["running_max"] == 3 and out["mean_output"] == 5
