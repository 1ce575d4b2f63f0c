"""SGLang's own data parallelism, two ranks of the demo model (`make soak`), each with a pool and a prefix cache."""

from __future__ import annotations

import pytest

from tests.support.client import generate, numbers, tokens

pytestmark = [pytest.mark.server, pytest.mark.soak]
FLAGS = ("--enable-keepkv", "--keepkv-budget", "0.2", "--max-total-tokens", "3000", "--dp-size", "2")


def test_ranks_answer_alike_and_share_nothing(launch):
    server = launch(*FLAGS)
    prompt = tokens(301, 1)
    first, again, other, third = (generate(server, prompt, 8, routed_dp_rank=rank) for rank in (0, 0, 1, 1))
    assert first.ids == other.ids and again.ids == third.ids
    assert [answer.cached for answer in (first, again, other, third)] == [0, 300, 0, 300]
    for answer in (again, third):
        assert answer.keepkv["cached_compressed_tokens"] == 300 and answer.keepkv["slots_held"] == 60 + 1 + 7
    states = [numbers(server, rank=rank) for rank in (0, 1)]
    assert [state["counters"]["compressions"] for state in states] == [1, 1]
    assert server.post_json("/flush_cache", {})[0] == 200
    for rank in (0, 1):
        state = numbers(server, rank=rank)
        assert state["available_slots"] == state["total_slots"] and state["entries"] == 0
