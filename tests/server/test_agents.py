"""Long runs on a live server (`make soak`): agents that do not fit, salts, priorities, a prompt four times the pool."""

from __future__ import annotations

import threading
import time

import pytest

from keepkv_sglang.tools.agent_load import AgentLoad
from keepkv_sglang.tools.bench.measure import summarise
from keepkv_sglang.tools.bench.workloads import Agents
from tests.support.client import flush, generate, numbers, tokens
from tests.support.memory import resident_bytes

pytestmark = [pytest.mark.server, pytest.mark.soak]


def test_six_agents_in_a_third_of_their_memory(launch):
    """Contexts of 8,202 tokens in 3,000 slots, where stock hits about 0.25 (make bench-agents)."""
    server = launch("--enable-keepkv", "--keepkv-budget", "0.1", "--max-total-tokens", "3000")
    load = AgentLoad()
    assert load.agents * load.context == 8202
    began = time.perf_counter()
    calls = Agents(load).run(server.port, lambda: None)
    report = summarise(calls, time.perf_counter() - began, {}, {})
    assert not report["errors"] and not report["short_answers"] and report["requests"] == 24
    assert report["hit_rate"] > 0.6
    assert report["compressed_share"] > 0.5
    counters = numbers(server)["counters"]
    assert counters["retractions_published"] <= 1 and counters["most_running"] >= 4


def test_a_higher_priority_preempts(launch):
    """The request that is preempted gives its row back in mid-reply, and goes on as if nothing had happened."""
    server = launch(
        *("--enable-keepkv", "--keepkv-budget", "0.2", "--max-total-tokens", "2000", "--max-running-requests", "1"),
        *("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "5"),
    )
    answers, order = {}, []

    def run(name: str, seed: int, new: int, priority: int) -> None:
        answers[name] = generate(server, tokens(600, seed), new, priority=priority)
        order.append(name)

    low = threading.Thread(target=run, args=("low", 1, 300, 0))
    low.start()
    while not numbers_while_busy(server)["active_rows"]:
        time.sleep(0.05)
    time.sleep(1)
    run("high", 2, 8, 100)
    low.join()
    assert order == ["high", "low"] and answers["low"].retractions >= 1
    assert len(answers["low"].ids) == 300 and answers["low"].keepkv["slots_held"] < 0.5 * 900
    flush(server)


def numbers_while_busy(server) -> dict:
    return server.get_json("/server_info")[1]["internal_states"][0]["keepkv"]


SALTED, WARM, SHORT, LONG, TOGETHER = 20_000, 2_000, 1, 70, 200


def test_twenty_thousand_salts_leave_nothing_behind(launch):
    """Short requests, each behind a salt of its own; every hundredth is long enough to be compressed."""
    server = launch("--enable-keepkv", "--max-total-tokens", "2000")
    sizes = {}
    for start in range(0, SALTED, TOGETHER):
        numbers_ = range(start, start + TOGETHER)
        asked = {
            "input_ids": [tokens(LONG if n % 100 == 0 else SHORT, n) for n in numbers_],
            "cache_salt": [f"salt {n}" for n in numbers_],
            "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        }
        status, answer = server.post_json("/generate", asked)
        assert status == 200, answer
        sizes[start + TOGETHER] = resident_bytes(server, "scheduler")
        if (start + TOGETHER) % WARM == 0:
            print(f"{start + TOGETHER} salts: {sizes[start + TOGETHER] / 2**20:.1f} MiB", flush=True)
    assert numbers(server)["counters"]["compressions"] >= 0.9 * SALTED / 100
    assert sizes[SALTED] <= 1.02 * sizes[WARM]
    flush(server)


def test_a_prompt_four_times_the_pool(launch):
    server = launch(
        *("--enable-keepkv", "--keepkv-budget", "0.1", "--max-total-tokens", "2000"),
        *("--chunked-prefill-size", "512"),
    )
    prompt = tokens(7500, 1)
    answer = generate(server, prompt, 16)
    assert len(answer.ids) == 16 and answer.keepkv["logical_tokens"] in (7515, 7516)
    assert answer.keepkv["slots_held"] <= 750 + 7500 // 512 + 1 + 17
    assert generate(server, prompt, 16).cached == 7499
    assert generate(server, [*prompt, *answer.ids, *tokens(200, 2)], 16).cached >= 7514
    flush(server)
