"""Small pools: retraction, prompts longer than the pool, and conversations that would not fit uncompressed."""

from __future__ import annotations

import threading

import pytest
from client import BORDER, body, flush, generate, numbers, tokens
from replay import events_of

pytestmark = pytest.mark.server
BOUND = 1e-4  # as in test_replay.py


@pytest.fixture(scope="module")
def retracting(launch, record):
    """SGLang's own test switch: a decode batch with two requests or more is retracted every 20 steps."""
    return launch(
        *("--enable-keepkv", "--keepkv-budget", "0.2", "--keepkv-interval", "32", "--max-total-tokens", "1200"),
        env={"KEEPKV_RECORD": str(record), "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"},
    )


def test_forced_retraction_matches_float64(retracting, record, oracle, text_tokens):
    """Two requests at once; one is retracted in mid-reply, finds its spans again and keeps the original borders."""
    prompts = {"a": text_tokens[100:340], "b": text_tokens[600:840]}
    answers = {}

    def run(name):
        answers[name] = generate(retracting, prompts[name], 65)

    threads = [threading.Thread(target=run, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(retracting)["counters"]["retractions_published"] >= 1, "nothing was retracted"
    for name, answer in answers.items():
        prompt = prompts[name]
        events = events_of(record, answer.rid)
        assert [event["end"] for event in events] == [239, 271, 303], "borders moved"
        row = oracle.clone()
        first = row.feed(prompt)[-1]
        expected = [first[answer.ids[0]].item(), *row.follow(answer.ids, events)]
        assert max(abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True)) <= BOUND, name


def test_retraction_that_lost_its_entries_recompresses_at_the_original_borders(retracting, record, oracle, text_tokens):
    """With skip-the-cache requests nothing is published, so the whole row is computed again."""
    flush(retracting)
    prompt = text_tokens[1000:1240]
    flood = threading.Event()
    answers = {}

    def run():
        answers["x"] = generate(retracting, prompt, 65)

    def evict():
        # Keeps the pool full of other prompts, so that what a retraction publishes is evicted at once.
        seed = 500
        while not flood.is_set():
            generate(retracting, tokens(850, seed), 2, {"enabled": False})
            seed += 1

    workers = [threading.Thread(target=run), threading.Thread(target=evict)]
    for worker in workers:
        worker.start()
    workers[0].join()
    flood.set()
    workers[1].join()
    answer = answers["x"]
    events = events_of(record, answer.rid)
    if not any(event["retractions"] for event in events if event["end"] == 239):
        pytest.skip("the pool never lost this request's entries in this run")
    # The last computation of the row is what the remaining tokens were generated from.
    last = max(event["retractions"] for event in events)
    again = [event for event in events if event["retractions"] == last]
    assert [event["end"] for event in again] == [239, 271, 303][: len(again)]
    done = again[0]["computed_tokens"] - len(prompt)
    row = oracle.clone()
    row.feed(prompt + answer.ids[:done])
    rest = [event for event in again if event["end"] <= len(prompt) + done]
    for event in rest:
        row.compress(event)
    expected = row.follow(answer.ids[done:], again)
    got = answer.logprobs[done + 1 :]
    assert max((abs(a - b) for a, b in zip(got, expected, strict=True)), default=0.0) <= BOUND


@pytest.fixture(scope="module")
def small(launch):
    """Through `sglang serve`, 700 slots, chunks of 128, mixed chunk."""
    import shutil
    import sys
    from pathlib import Path

    sglang = str(Path(sys.executable).with_name("sglang"))
    assert shutil.which(sglang)
    return launch(
        *("--enable-keepkv", "--keepkv-budget", "0.1", "--max-total-tokens", "700", "--chunked-prefill-size", "128"),
        "--enable-mixed-chunk",
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


def test_prompt_longer_than_the_pool(small):
    flush(small)
    prompt = tokens(2500, 130)
    answer = generate(small, prompt, 8)
    assert answer.keepkv["logical_tokens"] in (2507, 2508)
    assert answer.keepkv["slots_held"] <= 250 + 20 + 1 + 8  # one rounding up per chunk
    assert generate(small, prompt, 4).cached == 2499
    for keepkv in ({"enabled": False}, {"budget": 0.9}):
        status, error = small.post_json("/generate", body(prompt, 4, keepkv))
        assert status == 400 and "2500 tokens" in error["error"]["message"], error


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
