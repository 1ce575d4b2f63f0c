"""Small pools: retraction, prompts longer than the pool, and conversations that would not fit uncompressed."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from tests.support.client import BORDER, Router, body, flush, generate, numbers, tokens
from tests.support.replay import events_of

pytestmark = pytest.mark.server
BOUND = 3e-3  # the default rule fits: BOUND_FITTED of test_replay.py


FLAGS = ("--enable-keepkv", "--keepkv-budget", "0.2", "--keepkv-interval", "32", "--max-total-tokens", "1200")
# SGLang's own test switch: a decode batch of two requests or more retracts one of them every 20 steps.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}


PROTECT = "20-40,230-250"  # tokens of a prompt of 240 and of its reply


def two_at_once(server, prompts):
    """Runs both prompts together, 65 tokens each, the second with protected tokens; returns their answers in order."""
    answers = {}

    def run(index):
        answers[index] = generate(server, prompts[index], 65, {"protect": PROTECT} if index else None)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[0], answers[1]]


def error(answer, expected, skipped=0):
    return max(abs(a - b) for a, b in zip(answer.logprobs[skipped:], expected, strict=True))


def check_last_computation(answer, prompt, events, row):
    """Replays what the row was made of after the last retraction; returns how many reply tokens that computed again.

    SGLang matches a request that returns logprobs only up to its prompt, so the reply is computed again in one go and
    then cut at the borders at which decoding had cut it.
    """
    last = max(event["retractions"] for event in events)
    now = [event for event in events if event["retractions"] == last]
    done = now[0]["prefill_tokens"] - len(prompt)
    assert [event["end"] for event in now][-2:] == [271, 303], "borders moved"
    assert [event["window"] for event in now][-2:] == [[*range(239, 271)], [*range(271, 303)]], "a window shrank"
    if now[0]["end"] == 271:  # the prompt's span survived in the cache: it was made in an earlier computation
        row.feed(prompt[:239])
        row.compress(next(event for event in events if event["end"] == 239))
        rows = row.feed(prompt[239:] + answer.ids[:done])
    else:
        rows = row.feed(prompt + answer.ids[:done])
        assert now[0]["end"] == 239
    for event in now:
        if event["end"] <= row.tokens:
            row.compress(event)
    first = rows[-1][answer.ids[done]].item()
    assert error(answer, [first, *row.follow(answer.ids[done:], now)], done) <= BOUND
    return done


@pytest.mark.parametrize("flags", [(), ("--disable-radix-cache",)], ids=["radix", "no_radix"])
def test_forced_retraction_matches_float64(launch, record, oracle, text_tokens, flags):
    """Recompressed at the original borders; with the radix cache off even the prompt is computed again."""
    server = launch(*FLAGS, *flags, "--keepkv-record", str(record), env=RETRACT)
    prompts = [text_tokens[100:340], text_tokens[600:840]]
    again = 0
    for prompt, answer in zip(prompts, two_at_once(server, prompts), strict=True):
        events = events_of(record, answer.rid)
        again += check_last_computation(answer, prompt, events, oracle.clone())
        for event in events:
            if event["whole"] and event["end"] == 239:
                assert event["m"] == 42 + 29 and event["kept"][..., :20].unique().tolist() == list(range(20, 40))
    assert again, "nothing was retracted"
    counters = numbers(server)["counters"]
    assert bool(counters["retractions_published"]) and bool(counters["published"]) == (not flags)


@pytest.fixture(scope="module")
def router():
    """Subscribes where the server `small` will publish its KV events."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    router = Router(port)
    router.port = port
    yield router
    router.close()


@pytest.fixture(scope="module")
def small(launch, router):
    """Through `sglang serve`, 700 slots, chunks of 128, mixed chunk, KV events."""
    import shutil
    import sys
    from pathlib import Path

    endpoint = {"publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{router.port}", "bind": True}
    sglang = str(Path(sys.executable).with_name("sglang"))
    assert shutil.which(sglang)
    return launch(
        *("--enable-keepkv", "--keepkv-budget", "0.1", "--keepkv-interval", "64", "--max-total-tokens", "700"),
        *("--keepkv-pressure", "merge", "--keepkv-request-keys", "all"),
        *("--chunked-prefill-size", "128", "--enable-mixed-chunk", "--kv-events-config", json.dumps(endpoint)),
        command=(sglang, "serve"),
    )


def test_second_turn_hits_where_the_uncompressed_prompts_do_not_fit(small):
    flush(small)
    system = [*tokens(60, 100), BORDER]
    histories = []
    for agent in range(3):  # together 3 x 480 uncompressed tokens for 700 slots
        history = system + tokens(420, 101 + agent) + [BORDER] + tokens(4, 110)
        histories.append(history + generate(small, history, 12).ids)
    for agent, history in enumerate(histories):
        answer = generate(small, [*history, BORDER, *tokens(80, 120 + agent), BORDER, *tokens(4, 110)], 12)
        assert answer.keepkv["cached_compressed_tokens"] > 400, agent
        assert answer.cached >= answer.keepkv["cached_compressed_tokens"] + 61


def test_kv_events_tell_a_router_what_is_cached(small, router):
    """Compressed or not: what the router counts is what the next request finds, before and after evictions."""
    flush(small)
    router.listen(1000)
    assert router.cleared and not router.blocks
    prompts = [tokens(240, 140 + n) for n in range(15)]  # 15 x (24 + 16 raw slots), 240 to compute: some are evicted
    for prompt in prompts:
        answer = generate(small, prompt, 16)
        router.listen()
        assert router.cached(prompt + answer.ids) == len(prompt) + 15  # the last token has no slot
    generate(small, prompts[-1], 4, {"enabled": False})  # the same tokens a second time, uncompressed
    router.listen()
    held = []
    for prompt in [*reversed(prompts[-3:]), *prompts[:2]]:
        expected = min(router.cached(prompt), len(prompt) - 1)
        assert generate(small, prompt, 4).cached == expected
        held.append(expected)
        router.listen()
    assert held[0] == 239 and held.count(0) >= 1, held
    flush(small)
    router.listen(1000)
    assert not router.blocks


def test_cold_uncompressed_prefix_is_merged_before_it_is_evicted(small):
    """What a request without KeepKV left behind is merged once nothing has used it for long; only others find it."""
    flush(small)
    off = {"enabled": False}
    prompt, merges = tokens(340, 160), numbers(small)["counters"]["pressure_merges"]
    generate(small, prompt, 2, off)
    for seed in range(30):
        generate(small, tokens(100, 170 + seed), 2)
    state = numbers(small)
    # Scored with the fixed text's queries: whatever the pool, 128 of 30 layers, 9 heads of 64 in float32.
    assert state["memory"]["calibration_bytes"] == 128 * 30 * 9 * 64 * 4
    assert state["counters"]["pressure_merges"] > merges
    answer = generate(small, prompt, 2)
    merged, kept = answer.keepkv["cached_compressed_tokens"], answer.cached - answer.keepkv["cached_compressed_tokens"]
    assert merged in (128, 256) and kept in (0, 128)  # nodes end where SGLang's chunks ended
    assert answer.keepkv["slots_held"] <= kept + (341 - kept) / 10 + 5
    assert generate(small, prompt, 2, off).cached == kept


def test_a_protected_prefix_is_neither_found_merged_nor_merged(small):
    system = [*tokens(339, 165), BORDER]
    prompt = [*system, *tokens(100, 166), BORDER, *tokens(4, 110)]

    def after_pressure(first, *keepkv):
        """cached_compressed_tokens of requests that come when the first one's prefix is long cold."""
        flush(small)
        generate(small, prompt, 2, first)
        for seed in range(30):
            generate(small, tokens(100, 300 + seed), 2)
        return [generate(small, prompt, 2, wanted).keepkv["cached_compressed_tokens"] for wanted in keepkv]

    protect = {"protect": "system"}
    plain, whole = after_pressure({"enabled": False}, None, protect)
    assert plain and not whole, "merged for those who do not mind"
    assert after_pressure(protect, None) == [0], "not merged: evicted"
    info = generate(small, prompt, 2, protect).keepkv
    assert info["protected_tokens"] == 340 and 340 + 10 <= info["slots_held"] <= 340 + 12 + 7


def test_long_turn_cut_into_entries_is_shared_in_part(small):
    """span_tokens 128: two prompts that part after 300 tokens share two entries; whole turns share nothing."""
    flush(small)
    common = tokens(300, 210)
    for cut, cached in (({"span_tokens": 128}, 256), (None, 0)):
        generate(small, common + tokens(100, 211), 4, cut)
        answer = generate(small, common + tokens(100, 212), 4, cut)
        assert answer.cached == cached
        assert answer.keepkv["cached_compressed_tokens"] == cached
        assert answer.keepkv["slots_held"] <= 40 + 3 + 4


def test_prompt_longer_than_the_pool(small):
    flush(small)
    prompt = tokens(2500, 130)
    answer = generate(small, prompt, 8)
    assert answer.keepkv["logical_tokens"] in (2507, 2508)
    assert answer.keepkv["slots_held"] <= 250 + 20 + 1 + 8  # one rounding up per chunk
    assert generate(small, prompt, 4).cached == 2499
    protect = {"protect": "10-30,1270-1300,2490-2510"}  # across borders of chunks, and into the reply
    answer = generate(small, prompt, 8, protect)
    assert answer.keepkv["protected_tokens"] in (67, 68)
    assert 67 + 245 <= answer.keepkv["slots_held"] <= 68 + 244 + 20 + 1 + 8
    assert generate(small, prompt, 4, protect).cached == 2499
    for keepkv in ({"enabled": False}, {"budget": 0.9}):
        status, error = small.post_json("/generate", body(prompt, 4, keepkv))
        assert status == 400 and "2500 tokens" in error["error"]["message"], error


def test_admission_counts_what_requests_will_hold(small):
    """6 x (100 + 200 tokens) in 700 slots, where SGLang's own estimate admits two at a time."""
    flush(small)
    assert numbers(small)["counters"]["most_running"] <= 3, "earlier tests of this server ran few at once"
    threads = [threading.Thread(target=generate, args=(small, tokens(100, 220 + n), 200)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = numbers(small)
    assert state["counters"]["most_running"] == 6
    assert state["counters"]["retractions_published"] == 0


def test_requests_at_once_in_a_small_pool(small):
    """Eight requests with decode phases, mixed chunks, evictions: all finish, the accounting holds."""
    flush(small)
    answers = {}

    def run(seed):
        keepkv = [None, {"enabled": False}, {"budget": 40}, {"merge": "mean", "interval": 16}][seed % 4]
        answers[seed] = generate(small, tokens(150 + 40 * (seed % 3), 200 + seed), 40, keepkv)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8 and all(len(answer.ids) == 40 for answer in answers.values())
    numbers(small)
