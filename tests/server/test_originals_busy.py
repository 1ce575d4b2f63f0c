"""Originals on a server that is short of everything: a small pool, small chunks, int4, requests that come and go."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from keepkv_sglang.tools.agent_load import AgentLoad
from keepkv_sglang.tools.bench.workloads import Agents
from tests.support import isolation
from tests.support.client import body, flush, generate, numbers, tokens

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(launch):
    return launch(
        *("--enable-keepkv", "--keepkv-budget", "0.2", "--max-total-tokens", "1500", "--chunked-prefill-size", "128"),
        *("--keepkv-host-ratio", "3", "--keepkv-host-dtype", "int4", "--keepkv-interval", "32", "--enable-mixed-chunk"),
    )  # fmt: skip


def test_agents_in_a_pool_that_holds_one_of_them(server):
    """H9: strict memory checks stay green; whoever finds no slots for its history has it streamed."""
    load = Agents(AgentLoad(agents=4, turns=4, system=60, task=300, tool_result=100, reply=40, seed=3))
    calls = load.run(server.port, lambda: None)
    assert all(call.ok for call in calls), [call.error for call in calls if not call.ok][:3]
    state = numbers(server)
    counters = state["counters"]
    assert counters["unpacked"] + counters["streamed"] > 0 and counters["archived_tokens"] > 1500
    assert state["originals"]["unpacked_slots"] == 0
    held = state["originals"]
    assert held["tokens"] <= 64 * (held["blocks"] - held["free_blocks"])
    layers, heads, dim = 30, 3, 64
    assert held["bytes_per_token"] == layers * heads * (dim + 4 * dim / 64 + 4 * dim / 32)
    assert state["memory"]["originals_bytes"] == held["bytes_per_token"] * 64 * held["blocks"]


@pytest.mark.parametrize("unpack", [0.5, 0.001])
def test_samples_and_clients_that_leave(server, unpack):
    """Parallel samples of a new turn, and answers that are given up in the middle; histories with slots and streamed
    ones."""
    kind = {"unpack": unpack}
    before = numbers(server)["counters"]
    flush(server)
    first = tokens(400, 1)
    generate(server, first, 8, kind)
    later = body(first + tokens(80, 2), 40, kind)
    later["sampling_params"]["n"] = 3
    status, answers = server.post_json("/generate", later | {"rid": None})
    assert status == 200 and len(answers) == 3
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1
    requests = [body(first + tokens(90, seed), 200, kind) for seed in (10, 11, 12)]
    with ThreadPoolExecutor(len(requests)) as pool:
        jobs = [pool.submit(server.post_json, "/generate", request) for request in requests]
        time.sleep(2)
        for request in requests:
            server.post_json("/abort_request", {"rid": request["rid"]})
        assert all("meta_info" in job.result()[1] or "error" in job.result()[1] for job in jobs)
    assert generate(server, first + tokens(30, 13), 4, kind).keepkv["logical_tokens"] == 433
    counters = numbers(server)["counters"]
    read = "unpacked" if unpack == 0.5 else "streamed"
    assert counters[read] > before[read]
    flush(server)
    state = numbers(server)["originals"]
    assert state["free_blocks"] == state["blocks"] and state["tokens"] == 0


QUICK = {"window": 8, "references": 8}  # histories of short prompts are worth unpacking then


@pytest.mark.parametrize("unpack", [0.5, 0.001], ids=["unpacked", "streamed"])
def test_a_neighbours_originals_are_never_seen(server, unpack):
    before = numbers(server)["counters"]
    isolation.check(server, 3, {**QUICK, "unpack": unpack})
    counters, read = numbers(server)["counters"], "unpacked" if unpack == 0.5 else "streamed"
    assert counters[read] > before[read]


@pytest.mark.soak
@pytest.mark.parametrize("unpack", [0.5, 0.001], ids=["unpacked", "streamed"])
def test_a_neighbours_originals_are_never_seen_in_many_examples(server, unpack):
    isolation.check(server, 100, {**QUICK, "unpack": unpack})


def test_a_request_may_not_ask_for_more_than_the_server_allows(server):
    status, answer = server.post_json("/generate", body(tokens(20, 1), 2, {"unpack": 0.9}))
    assert status == 400 and "use at most 0.5" in answer["error"]["message"]
    status, answer = server.post_json("/generate", body(tokens(20, 1), 2, {"host_ratio": 9}))
    assert status == 400 and "setting of the server" in answer["error"]["message"]
    assert generate(server, tokens(20, 1), 2, {"unpack": False}).keepkv["unpacked_tokens"] == 0
