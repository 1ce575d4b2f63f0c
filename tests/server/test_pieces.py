"""A live server that compresses long prompts in pieces (--keepkv-piece-tokens)."""

from __future__ import annotations

import json
import threading
import urllib.request

import pytest

from tests.support.client import body, flush, generate, tokens

pytestmark = pytest.mark.server
PROMPT, STEPS = 900, 18  # about so many pieces: two passes over 30 layers, 4 at a time, and one for the rest


@pytest.fixture(scope="module")
def server(launch):
    return launch("--enable-keepkv", "--keepkv-piece-tokens", "64", "--max-total-tokens", "4000")


def test_the_cache_has_what_it_would_have_at_once(server):
    """A reply of two tokens ends with the first piece: the rest is done at once. The next prompt reads the entry."""
    prompt, behind = tokens(PROMPT, 1), tokens(40, 2)
    found = []
    for reply in (2, STEPS + 10):
        flush(server)
        first = generate(server, prompt, reply)
        assert first.keepkv["compressions"] == 1
        found.append(generate(server, prompt + behind, 4, logprob_start_len=PROMPT))
        assert found[-1].keepkv["cached_compressed_tokens"] > PROMPT - 100
    at_once, pieces = ([entry[0] for entry in answer.meta["input_token_logprobs"][1:]] for answer in found)
    # The default rule fits votes and values: float32 sums in another order, BOUND_FITTED of test_replay.py.
    assert max(abs(a - b) for a, b in zip(at_once, pieces, strict=True)) < 3e-3
    assert found[0].ids == found[1].ids
    flush(server)


def test_its_own_first_tokens_read_the_uncompressed_prompt(server):
    """So they are those that KeepKV off gives; and they do not depend on who else is there."""
    prompt = tokens(PROMPT, 3)
    off = generate(server, prompt, STEPS - 4, {"enabled": False})
    alone = generate(server, prompt, 60)
    # float32; only kernels for other row lengths
    assert max(abs(a - b) for a, b in zip(off.logprobs, alone.logprobs[: STEPS - 4], strict=True)) < 1e-4
    flush(server)
    neighbour = threading.Thread(target=generate, args=(server, tokens(30, 4), 15, {"enabled": False}))
    neighbour.start()
    beside = generate(server, prompt, 18)
    neighbour.join()
    assert beside.ids == alone.ids[:18]
    flush(server)


def test_clients_that_leave(server):
    """Four long prompts decode together; two of them are cut while theirs is compressed."""
    answers = {}

    def run(seed):
        answers[seed] = generate(server, tokens(PROMPT - 200, seed), 70)

    def leave(seed):
        ask = json.dumps(body(tokens(PROMPT, seed), 70, stream=True)).encode()
        request = urllib.request.Request(f"{server.base_url}/generate", ask, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as stream:
            for _ in range(6):
                stream.readline()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (10, 11)]
    threads += [threading.Thread(target=leave, args=(seed,)) for seed in (12, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(answer.ids) == 70 and answer.keepkv["compressions"] >= 1 for answer in answers.values())
    flush(server)
