"""One server at a 10 % budget: accounting, sharing, isolation, bad input, streams and the OpenAI client."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.request

import openai
import pytest

from keepkv_sglang.settings.config import KeepKVConfig
from tests.support import isolation
from tests.support.client import BORDER, body, flush, generate, numbers, tokens

pytestmark = pytest.mark.server
INTERVAL = KeepKVConfig().interval


@pytest.fixture(scope="module")
def server(launch):
    return launch("--enable-keepkv", "--keepkv-budget", "0.1", "--max-total-tokens", "2600", "--enable-cache-report")


@pytest.fixture(autouse=True)
def clean(server):
    flush(server)
    yield
    numbers(server)


def server_state(server):
    return server.get_json("/server_info")[1]["internal_states"][0]["keepkv"]


def wait_until_idle(server):
    """After a client went away: its request holds nothing any more."""
    deadline = time.monotonic() + 60
    while server_state(server)["active_rows"]:
        assert time.monotonic() < deadline, "the aborted request still holds its row"
        time.sleep(0.2)
    time.sleep(0.5)


def test_right_after_prefill_a_tenth_and_the_last_prompt_token(server):
    answer = generate(server, tokens(1500, 1), 1)
    info = answer.keepkv
    assert (info["logical_tokens"], info["slots_held"], info["compressions"]) == (1500, 151, 1)
    assert info["budget"] == 0.1 and info["cached_compressed_tokens"] == 0
    # Every token of the 1,499 is kept, merged or dropped, in every layer and head.
    assert info["merged"] + info["dropped"] == pytest.approx(1499 - 150, abs=0.02)


@pytest.mark.parametrize("new", [2, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL + 2])
def test_held_while_decoding(server, new):
    answer = generate(server, tokens(700, 2), new)
    generated = answer.keepkv["logical_tokens"] - 700
    assert generated in (new - 1, new)
    assert answer.keepkv["slots_held"] <= 70 + 1 + math.ceil(0.1 * generated) + INTERVAL


def test_freed_slots_are_usable_by_others(server):
    """Two 1,500-token requests run at once in a pool of 2,600 slots, with nothing retracted."""
    answers = {}

    def run(name, seed, new):
        answers[name] = generate(server, tokens(1500, seed), new)

    before = numbers(server)["counters"]["compressions"]
    first = threading.Thread(target=run, args=("first", 11, 100))
    first.start()
    deadline = time.monotonic() + 120
    while True:  # the first one decodes
        status, info = server.get_json("/server_info")
        assert status == 200 and time.monotonic() < deadline
        if info["internal_states"][0]["keepkv"]["counters"]["compressions"] > before:
            break
        time.sleep(0.05)
    run("second", 12, 4)
    second_finished_first = first.is_alive()
    first.join()
    assert second_finished_first, "the second waited for the first one's slots"
    assert answers["first"].retractions == 0 == answers["second"].retractions
    alone = generate(server, tokens(1500, 12), 4)
    assert alone.cached == 1499


def test_a_prompt_may_use_the_room_that_replies_take_later(server):
    """14 x (1,000 + 60 tokens), each 160 slots in the end, in 2,600: all decode at once. Asked for a prompt's slots
    and for all replies' room at the same time, the pool would take 10."""
    flush(server)
    threads = [threading.Thread(target=generate, args=(server, tokens(1000, 300 + n), 60)) for n in range(14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters = numbers(server)["counters"]
    assert counters["most_running"] >= 13 and counters["retractions_published"] == 0


@pytest.mark.parametrize("second", [{"enabled": False}, {"budget": 0.2}], ids=str)
def test_shared_prefix_is_bit_identical_whether_the_first_was_compressed(server, second):
    system = [*tokens(499, 20), BORDER]
    a = system + tokens(200, 21) + [BORDER] + tokens(5, 22)
    b = system + tokens(150, 23) + [BORDER] + tokens(5, 24)
    seen = []
    for first in ({"enabled": False}, {"budget": 0.1}):
        flush(server)
        generate(server, a, 8, first)
        answer = generate(server, b, 24, second)
        assert answer.cached == 500
        seen.append((answer.ids, answer.logprobs))
    assert seen[0] == seen[1], "compressing one request changed another's prefix"


def test_same_prompt_again_changed_reply_and_partial_overlap(server):
    prompt = tokens(400, 30)
    first = generate(server, prompt, 24)
    again = generate(server, prompt, 24)
    assert again.cached == 399 == again.keepkv["cached_compressed_tokens"]
    # The first token of the first request came from the uncompressed prompt; from now on nothing changes any more.
    third = generate(server, prompt, 24)
    assert (third.ids, third.logprobs) == (again.ids, again.logprobs)
    changed = generate(server, prompt + tokens(40, 31), 4)  # a reply that was never generated
    assert changed.cached == 399
    continued = generate(server, prompt + first.ids + tokens(40, 32), 4)
    assert continued.cached >= 400 + 23

    # Half of a compressed turn is nobody's prefix: the request computes its own.
    half = prompt[:200] + tokens(100, 33)
    partial = generate(server, half, 16)
    assert partial.cached == 0 == partial.keepkv["cached_compressed_tokens"]
    flush(server)
    assert generate(server, half, 16).logprobs == partial.logprobs


def test_entries_are_invisible_to_other_configurations_and_namespaces(server):
    prompt = tokens(300, 40)
    generate(server, prompt, 4)
    for keepkv in ({"enabled": False}, {"budget": 0.2}, {"merge": "evict"}, {"window": 16}, {"budget": 1}):
        other = generate(server, prompt, 4, keepkv)
        assert other.cached == 0, keepkv
        flush(server)
        generate(server, prompt, 4)
    for extra in ({"extra_key": "tenant"}, {"cache_salt": "salt"}):
        status, data = server.post_json("/generate", body(prompt, 4, **extra))
        assert status == 200 and data["meta_info"]["cached_tokens"] == 0, extra
    assert generate(server, prompt, 4).cached == 299


def test_a_neighbours_own_tokens_are_never_seen(server):
    isolation.check(server, 4, {})


@pytest.mark.soak
def test_a_neighbours_own_tokens_are_never_seen_in_many_examples(server):
    isolation.check(server, 150, {})


def test_a_neighbour_that_runs_at_the_same_time_changes_nothing(server):
    """Prompts are computed alone, so behind another's salt the answer is that of a quiet server, bit for bit."""
    turns = [tokens(200, 71), tokens(290, 71), tokens(380, 71)]
    quiet = [isolation.seen(generate(server, ids, 1)) for ids in turns]
    flush(server)
    salted = body(tokens(380, 71), 400, cache_salt="neighbour", stream=True)
    call = urllib.request.Request(
        f"{server.base_url}/generate", json.dumps(salted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=120) as answer:
        answer.readline()  # it decodes
        beside = [isolation.seen(generate(server, ids, 1)) for ids in turns]
        assert server_state(server)["active_rows"], "it ended before"
    assert beside == quiet
    wait_until_idle(server)


def test_parallel_samples_share_the_compressed_prompt(server):
    request = body(tokens(500, 50), 8)
    request["sampling_params"] |= {"n": 3, "temperature": 0.9}
    request.pop("rid")
    status, data = server.post_json("/generate", request)
    assert status == 200 and len(data) == 3
    assert all(part["meta_info"]["keepkv"]["cached_compressed_tokens"] == 499 for part in data)
    assert all(part["meta_info"]["keepkv"]["slots_held"] <= 50 + 1 + 8 for part in data)


def test_protected_tokens_on_top_of_the_budget(server):
    """More than the protected ones are compressed; parallel samples share that; all protected: nothing is."""
    request = body(tokens(501, 51), 8, {"protect": "100-200,480-490"})
    request["sampling_params"] |= {"n": 3, "temperature": 0.9}
    request.pop("rid")
    status, data = server.post_json("/generate", request)
    assert status == 200 and len(data) == 3
    for part in data:
        info = part["meta_info"]["keepkv"]
        assert (info["cached_compressed_tokens"], info["protected_tokens"]) == (500, 110)
        assert 110 + 39 < info["slots_held"] <= 110 + 39 + 1 + 8
    whole = generate(server, tokens(501, 52), 4, {"protect": "0-9000"}).keepkv
    assert whole["compressions"] == 0 and whole["slots_held"] == whole["logical_tokens"] == whole["protected_tokens"]
    messages = [{"role": "system", "content": "Answer in one word. " * 40}, {"role": "user", "content": "Why? " * 100}]
    chat = {"model": "m", "messages": messages, "max_tokens": 4, "return_meta_info": True}
    status, data = server.post_json(
        "/v1/chat/completions", chat | {"custom_params": {"keepkv": {"protect": "system,260-270"}}}
    )
    assert status == 200, data
    info = data["choices"][0]["meta_info"]["keepkv"]
    assert 160 < info["protected_tokens"] - 10 < 260 and info["compressions"] == 1


def test_short_turns_stay_whole_until_they_add_up(server):
    history = tokens(30, 60)
    held = []
    for turn in range(5):
        answer = generate(server, history, 6)
        held.append((answer.keepkv["slots_held"], answer.keepkv["logical_tokens"], answer.keepkv["compressions"]))
        history = history + answer.ids + tokens(20, 61 + turn)
    assert held[0][2] == 0 and held[0][0] == held[0][1]
    assert any(compressions for _, _, compressions in held), held
    assert held[-1][0] < held[-1][1]


def test_stream_reports_in_its_last_chunk(server):
    request = json.dumps(body(tokens(200, 80), 5, stream=True)).encode()
    call = urllib.request.Request(f"{server.base_url}/generate", request, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        lines = [line.decode().strip()[6:] for line in answer if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert len(chunks) >= 3 and all("keepkv" not in chunk["meta_info"] for chunk in chunks[:-1])
    assert chunks[-1]["meta_info"]["keepkv"]["slots_held"] <= 20 + 1 + 5


def test_openai_client_multi_turn(server):
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
    system = "You are a careful assistant. " + "Answer from the log that the tool returns, in one sentence. " * 12
    messages = [{"role": "system", "content": system}]
    reports = []
    for turn in range(3):
        messages.append(
            {"role": "user", "content": f"Tool result {turn}: " + f"line {turn} status ok value {turn * 7}; " * 30}
        )
        answer = client.chat.completions.create(
            model="m",
            messages=messages,
            max_tokens=16,
            temperature=0,
            extra_body={"return_meta_info": True, "custom_params": {"keepkv": {"budget": 0.2}}},
        )
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        meta = answer.choices[0].meta_info
        reports.append((meta["keepkv"], answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
    info, cached, prompt = reports[-1]
    assert info["cached_compressed_tokens"] > 0 and cached > 0.5 * prompt
    assert info["slots_held"] < 0.6 * info["logical_tokens"]
    stream = client.chat.completions.create(
        model="m",
        messages=messages[:2],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"custom_params": {"keepkv": {"budget": 0.2}}},
    )
    assert sum(1 for chunk in stream if chunk.choices) >= 3
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="m", messages=messages[:2], extra_body={"custom_params": {"keepkv": {"budget": -1}}}
        )


def test_nothing_behind_a_stop_is_cached(server):
    """A stop string and a stop token: the answer ends there, and so does what a next turn finds."""
    prompt = tokens(300, 100)
    whole = server.post_json("/generate", body(prompt, 40))[1]
    word = whole["text"][len(whole["text"]) // 2 :][:4]
    flush(server)
    stopped = server.post_json("/generate", with_sampling(body(prompt, 40), stop=[word]))[1]
    assert word not in stopped["text"] and whole["text"].startswith(stopped["text"])
    assert stopped["meta_info"]["finish_reason"]["matched"] == word
    flush(server)
    ids = whole["output_ids"]
    at = next(index for index in range(1, 40) if ids[index] not in ids[:index])
    stop = with_sampling(body(prompt, 40), stop_token_ids=[ids[at]], ignore_eos=False)  # which would ignore these too
    ids = server.post_json("/generate", stop)[1]["output_ids"]
    assert ids == whole["output_ids"][: at + 1]
    assert generate(server, prompt + ids + tokens(40, 101), 2).cached <= 300 + len(ids)


def with_sampling(request, **more):
    request["sampling_params"] |= more
    return request


def test_logprobs_of_the_prompt_over_a_compressed_prefix(server):
    """SGLang computes the tokens whose logprobs are asked for, so they are those of an uncompressed prompt."""
    prompt = tokens(400, 110)
    generate(server, prompt, 2)
    assert generate(server, prompt, 2).cached == 399, "there is a compressed prefix"
    seen = []
    for keepkv in (None, {"enabled": False}):
        answer = generate(server, prompt, 2, keepkv, logprob_start_len=0)
        assert answer.cached == 0
        seen.append([entry[:2] for entry in answer.meta["input_token_logprobs"]])
        flush(server)
    assert len(seen[0]) == 400 and seen[0] == seen[1]


def test_structured_output(server):
    """xgrammar's masks over a compressed prompt and a compressed reply."""
    schema = {
        "type": "object",
        "properties": {"lines": {"type": "array", "items": {"type": "integer"}, "minItems": 50, "maxItems": 50}},
        "required": ["lines"],
    }
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "List the numbers of the lines. " + "line 7 is fine; " * 60}],
        "max_tokens": 600,
        "temperature": 0,
        "return_meta_info": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "lines", "schema": schema}},
    }
    status, data = server.post_json("/v1/chat/completions", chat)
    assert status == 200, data
    assert len(json.loads(data["choices"][0]["message"]["content"])["lines"]) == 50
    assert data["choices"][0]["meta_info"]["keepkv"]["compressions"] >= 2


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_paused_while_it_decodes_and_the_weights_are_loaded_again(server, model_path, mode):
    """Every token comes, and what was cached under the old weights is gone once they are replaced."""
    prompt, ids = tokens(200, 120), []
    request = json.dumps(body(prompt, 60, stream=True)).encode()
    call = urllib.request.Request(f"{server.base_url}/generate", request, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        for _ in range(6):
            answer.readline()
        assert server.post_json("/pause_generation", {"mode": mode})[0] == 200
        if mode == "retract":
            status, said = server.post_json("/update_weights_from_disk", {"model_path": str(model_path)})
            assert status == 200 and said["success"], said
        assert server.post_json("/continue_generation", {})[0] == 200
        for line in answer:
            if line.startswith(b"data: {"):
                ids = json.loads(line[6:])["output_ids"]
    assert len(ids) == 60
    if mode == "in_place":
        status, said = server.post_json("/update_weights_from_disk", {"model_path": str(model_path)})
        assert status == 200 and said["success"], said
        assert generate(server, prompt, 2).cached == 0


def test_aborted_stream_leaks_nothing(server):
    for read in (1, 3):
        request = json.dumps(body(tokens(600, 90 + read), 400, stream=True)).encode()
        call = urllib.request.Request(f"{server.base_url}/generate", request, {"Content-Type": "application/json"})
        answer = urllib.request.urlopen(call, timeout=120)
        for _ in range(2 * read):
            answer.readline()
        answer.close()  # the client goes away in mid-decode
    wait_until_idle(server)


def test_memory_is_reported_and_small(server):
    memory = numbers(server)["memory"]
    assert memory["persistent_share_of_16_bit_pool"] < 0.02
    assert memory["arena_bytes"] <= 512 << 20 and memory["votes_bytes"] > 0
    assert memory["calibration_bytes"] == 0, "only --keepkv-pressure merge needs it"
