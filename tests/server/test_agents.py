"""Long runs on a live server (`make soak`): agents whose contexts do not fit, a prompt four times the pool."""

from __future__ import annotations

import time

import pytest

from keepkv_sglang.tools.agent_load import AgentLoad
from keepkv_sglang.tools.bench.measure import summarise
from keepkv_sglang.tools.bench.workloads import Agents
from tests.support.client import flush, generate, numbers, tokens

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
