"""A chunk of a long prompt that finds no slots is parked: no token of any answer is lost, and nobody starves.

The pool is small and SGLang is told to admit nearly everybody (--schedule-conservativeness 0.02), so chunks of the
prompt that is longer than the pool are parked while small requests come in.
"""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.support.client import body, flush, generate, numbers, tokens

pytestmark = pytest.mark.server
FLAGS = (
    *("--enable-keepkv", "--keepkv-budget", "0.2", "--keepkv-references", "32", "--max-total-tokens", "1200"),
    *("--chunked-prefill-size", "128", "--enable-mixed-chunk", "--schedule-conservativeness", "0.02"),
)
OFF = {"enabled": False}


def together(server, calls, pause_s):
    """Starts the calls (ids, new, keepkv) one after the other, each in its own thread; their answers in order."""
    answers = [None] * len(calls)

    def run(index, ids, new, keepkv):
        status, data = server.post_json("/generate", body(ids, new, keepkv) | {"return_logprob": False})
        answers[index] = (status, data)

    threads = [threading.Thread(target=run, args=(index, *call)) for index, call in enumerate(calls)]
    for thread in threads:
        thread.start()
        time.sleep(pause_s)
    for thread in threads:
        thread.join()
    return answers


def check(server, calls, answers, looked_at):
    """Length and logical tokens of every answer; of `looked_at` also what a next turn hits, and of those that are never
    compressed that a quiet server answers the same."""
    for index, ((ids, new, keepkv), (status, data)) in enumerate(zip(calls, answers, strict=True)):
        assert status == 200, data
        info, out = data["meta_info"]["keepkv"], data["output_ids"]
        assert len(out) == new, (len(ids), keepkv, data["meta_info"])
        assert info["logical_tokens"] == len(ids) + new - 1, (len(ids), new, info)
        if index not in looked_at:
            continue
        next_turn = ids + out + tokens(5, len(ids))
        if keepkv == OFF:
            assert generate(server, ids, new, OFF).ids == out, "not what a quiet server answers"
            assert generate(server, next_turn, 1, OFF).cached <= len(ids) + new
        else:
            again = generate(server, next_turn, 1, keepkv)
            assert again.cached <= len(ids) + new - 1
            assert again.keepkv["logical_tokens"] == len(next_turn)


def chaos(server, seed):
    """Fourteen that decode, of different lengths, one prompt of two pools, and small ones that come in meanwhile.

    SGLang admits nobody after a round that could not take everybody, until one leaves: with lengths that differ the
    long prompt comes in while others still grow.
    """
    rng = random.Random(seed)
    calls = [(tokens(20, seed + index), rng.randrange(30, 220), OFF) for index in range(14)]
    calls.insert(rng.randrange(4, 14), (tokens(2500, seed + 20), 8, {"budget": 0.1}))
    long = next(index for index, (ids, _, _) in enumerate(calls) if len(ids) > 20)
    calls += [(tokens(12, seed + 30 + index), 2, OFF) for index in range(rng.randrange(20, 40))]
    before = numbers(server)["counters"]["parked"]
    answers = together(server, calls, rng.choice((0.05, 0.1, 0.2)))
    others = [index for index in range(15) if index != long]
    check(server, calls, answers, {long, *rng.sample(others, 2), *rng.sample(range(15, len(calls)), 4)})
    flush(server)
    return numbers(server)["counters"]["parked"] - before


@pytest.mark.soak
@pytest.mark.parametrize("flags", [(), ("--disable-overlap-schedule",)], ids=["overlap", "no_overlap"])
def test_chaos(launch, flags):
    server = launch(*FLAGS, *flags)
    assert sum(chaos(server, 10_000 * seed) for seed in range(1, 11)) > 0, "no chunk was parked"
