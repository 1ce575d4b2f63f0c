"""A chunk of a long prompt that finds no slots is parked: no token of any answer is lost, and nobody starves.

The pool is small and SGLang is told to admit nearly everybody (--schedule-conservativeness 0.02), so chunks of the
prompt that is longer than the pool are parked while small requests come in.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time

import httpx
import pytest

from tests.support.client import body, flush, numbers, tokens

pytestmark = pytest.mark.server
FLAGS = (
    *("--enable-keepkv", "--keepkv-budget", "0.2", "--keepkv-references", "32", "--keepkv-interval", "16"),
    *("--max-total-tokens", "1200", "--chunked-prefill-size", "128", "--enable-mixed-chunk"),
    *("--schedule-conservativeness", "0.02", "--max-running-requests", "64"),
)
OFF = {"enabled": False}


def asked(ids, new, keepkv):
    """A request of exactly `new` tokens. With ignore_eos SGLang's admission would count them all, and with logprobs it
    would mix no chunk with decoding."""
    request = body(ids, new, keepkv) | {"return_logprob": False}
    del request["sampling_params"]["ignore_eos"]
    request["sampling_params"]["min_new_tokens"] = new
    return request


def answer_of(server, ids, new, keepkv):
    status, data = server.post_json("/generate", asked(ids, new, keepkv))
    assert status == 200, data
    return data["output_ids"], data["meta_info"]


class Calls:
    """Requests (ids, new, keepkv), each in a thread of its own; `answers` are in the order of start()."""

    def __init__(self, server):
        self.server, self.made, self.answers, self.threads = server, [], [], []
        self.progress = queue.Queue()  # of the call that is watched: its tokens so far

    def start(self, ids, new, keepkv, *, watched=False):
        index = len(self.made)
        self.made.append((ids, new, keepkv))
        self.answers.append(None)
        self.threads.append(threading.Thread(target=self._watch if watched else self._run, args=(index,)))
        self.threads[-1].start()

    def _run(self, index):
        self.answers[index] = self.server.post_json("/generate", asked(*self.made[index]))

    def _watch(self, index):
        request, url = asked(*self.made[index]) | {"stream": True}, f"{self.server.base_url}/generate"
        with httpx.stream("POST", url, json=request, timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.answers[index] = answer.status_code, json.loads(line.removeprefix("data: "))
                    self.progress.put(len(self.answers[index][1]["output_ids"]))

    def wait_for(self, tokens_):
        """Until the watched call has made so many tokens."""
        while self.progress.get(timeout=120) < tokens_:
            pass

    def join(self):
        for thread in self.threads:
            thread.join()


def check(calls, looked_at):
    """Length and logical tokens of every answer; of `looked_at` also what a next turn hits, and of those that are never
    compressed that a quiet server answers the same."""
    server = calls.server
    for index, ((ids, new, keepkv), (status, data)) in enumerate(zip(calls.made, calls.answers, strict=True)):
        assert status == 200, data
        info, out = data["meta_info"]["keepkv"], data["output_ids"]
        assert len(out) == new, (len(ids), keepkv, data["meta_info"])
        assert info["logical_tokens"] == len(ids) + new - 1, (len(ids), new, info)
        if index not in looked_at:
            continue
        next_turn = ids + out + tokens(5, len(ids))
        if keepkv == OFF:
            assert answer_of(server, ids, new, OFF)[0] == out, "not what a quiet server answers"
            assert answer_of(server, next_turn, 1, OFF)[1]["cached_tokens"] <= len(ids) + new
        else:
            info = answer_of(server, next_turn, 1, keepkv)[1]
            assert info["cached_tokens"] <= len(ids) + new - 1
            assert info["keepkv"]["logical_tokens"] == len(next_turn)


def chaos(server, seed):
    """Twelve that decode, then a prompt of three pools, and small ones that come in while it is computed.

    The twelve come one by one: of those that come together SGLang counts all that they may generate. When the long
    prompt arrives there is room for it, by an admission that counts 2 % of what the others may still take; they go on
    growing, and one of its later chunks finds no slots.
    """
    rng, calls = random.Random(seed), Calls(server)
    before = numbers(server)["counters"]["parked"]
    calls.start(tokens(20, seed), 180, OFF, watched=True)
    for index in range(1, 12):
        calls.wait_for(2 * index)
        calls.start(tokens(20, seed + index), rng.randrange(110, 160), OFF)
    calls.wait_for(rng.randrange(44, 52))
    calls.start(tokens(3500, seed + 20), 8, {"budget": 0.05})
    for index in range(rng.randrange(20, 40)):
        calls.start(tokens(12, seed + 30 + index), 2, OFF)
        time.sleep(rng.choice((0.02, 0.05, 0.1)))
    calls.join()
    small = range(13, len(calls.made))
    check(calls, {12, *rng.sample(range(12), 2), *rng.sample(small, 4)})
    flush(server)
    return numbers(server)["counters"]["parked"] - before


@pytest.mark.soak
@pytest.mark.parametrize("flags", [(), ("--disable-overlap-schedule",)], ids=["overlap", "no_overlap"])
def test_chaos(launch, flags):
    server = launch(*FLAGS, *flags)
    assert sum(chaos(server, 10_000 * seed) for seed in (1, 2)) > 0, "no chunk was parked"
