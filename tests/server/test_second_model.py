"""Qwen2.5-Coder-0.5B: biases on q, k, v, seven query heads per kv head, another template. In `make test` when
`keepkv model qwen2.5-coder-0.5b` has made it; `make soak` makes it. transformers is imported where it is used: start-up
cost, and most runs skip all of this.
"""

from __future__ import annotations

import os

import openai
import pytest

from keepkv_sglang.tools.models import cache
from keepkv_sglang.tools.models.catalogue import MODELS
from keepkv_sglang.tools.places import REPO
from tests.support.client import flush, generate, numbers, tokens
from tests.support.examples import calls, run_example
from tests.support.replay import Replay
from tests.support.replayed import BOUND, BOUND_FITTED, FLAGS, STRICT_RULE, next_turn

pytestmark = pytest.mark.server
MODEL = MODELS["qwen2.5-coder-0.5b"]
SIZE = ("--max-total-tokens", "6000")
UNIFORM = {"heads": "uniform"}  # which heads share cells depends on the rank that has them


@pytest.fixture(scope="module")
def qwen() -> str:
    if os.environ.get("KEEPKV_SOAK") != "1":
        folder = cache.default_cache_dir() / MODEL.folder
        if not cache.is_complete(folder, MODEL.sha256):
            pytest.skip(f"not made: keepkv model {MODEL.name}")
    return str(cache.prepare(MODEL.name))


@pytest.fixture(scope="module")
def text(qwen) -> list[int]:
    """Tokens of English prose, without message borders."""
    from transformers import AutoTokenizer  # start-up cost: most runs skip this file

    return AutoTokenizer.from_pretrained(qwen).encode((REPO / "LICENSE").read_text())


@pytest.fixture(scope="module")
def stock(launch, qwen, text):
    """What stock SGLang answers; before the other servers, as two do not fit."""
    server = launch("--model-path", qwen, *SIZE)
    return [(prompt, generate(server, prompt, 24)) for prompt in (text[:40], text[200:700], tokens(200, 7))]


@pytest.fixture(scope="module")
def ranks(launch, qwen, text, stock):
    """Two tensor-parallel ranks, one kv head each: two turns."""
    server = launch("--model-path", qwen, *FLAGS, "--tp-size", "2")
    made = [generate(server, text[:300], 40, UNIFORM), generate(server, text[:420], 24, UNIFORM)]
    numbers(server)
    return made


@pytest.fixture(scope="module")
def server(launch, qwen, record, ranks):
    extra = ("--enable-cache-report", "--keepkv-record", str(record), "--tool-call-parser", "qwen25")
    return launch("--model-path", qwen, *FLAGS, *extra)


def test_two_turns_in_float64(server, record, qwen, text):
    prompt, row = text[100:400], Replay.load(qwen)
    prefilled = row, row.feed(prompt)[-1]
    next_turn(server, record, prompt, prefilled, text, STRICT_RULE, BOUND)
    next_turn(server, record, prompt, prefilled, text, {"merge": "attention_matching", "references": 256}, BOUND_FITTED)


def test_two_ranks_answer_as_one(server, ranks, text):
    flush(server)
    for prompt, new, together in zip((text[:300], text[:420]), (40, 24), ranks, strict=True):
        alone = generate(server, prompt, new, UNIFORM)
        assert alone.ids == together.ids
        # merged and dropped are of a rank's own heads.
        for key in ("logical_tokens", "slots_held", "cached_compressed_tokens", "compressions"):
            assert alone.keepkv[key] == together.keepkv[key]
        assert max(abs(a - b) for a, b in zip(alone.logprobs, together.logprobs, strict=True)) <= BOUND_FITTED


def test_budget_one_is_stock(server, stock):
    flush(server)
    for prompt, expected in stock:
        got = generate(server, prompt, 24, {"budget": 1})
        assert got.ids == expected.ids
        assert (
            max(abs(a - b) for a, b in zip(got.logprobs, expected.logprobs, strict=True)) <= BOUND
        )  # float32, in another order
    numbers(server)


def test_a_fifth_is_held_and_given_back(server):
    flush(server)
    answer = generate(server, tokens(1001, 1), 1)
    info = answer.keepkv
    assert (info["logical_tokens"], info["slots_held"], info["compressions"]) == (1001, 201, 1)
    assert info["merged"] + info["dropped"] == pytest.approx(1000 - 200, abs=0.02)
    flush(server)


def test_others_share_the_compressed_prefix(server):
    flush(server)
    prompt = tokens(800, 2)
    first = generate(server, prompt, 2)
    again = generate(server, prompt, 2)
    other = generate(server, prompt[:799] + tokens(60, 3), 2)
    assert first.cached == 0 and again.cached == other.cached == 799
    assert again.ids == generate(server, prompt, 2).ids and other.keepkv["cached_compressed_tokens"] == 799
    numbers(server)


def test_openai_client_keeps_the_system_message_whole(server, qwen):
    from transformers import AutoTokenizer  # start-up cost: most runs skip this file

    flush(server)
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
    system = "You are a careful assistant. " + "Answer from the log that the tool returns, in one sentence. " * 12
    messages = [{"role": "system", "content": system}]
    for turn in range(3):
        said = f"Tool result {turn}: " + f"line {turn} status ok value {turn * 7}; " * 30
        messages.append({"role": "user", "content": said})
        answer = client.chat.completions.create(
            model="m", messages=messages, max_tokens=16, temperature=0, extra_body={"return_meta_info": True}
        )  # fmt: skip
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    info, usage = answer.choices[0].meta_info["keepkv"], answer.usage
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    anchor = len(tokenizer.encode(f"<|im_start|>system\n{system}<|im_end|>"))
    assert info["cached_compressed_tokens"] > 0
    assert usage.prompt_tokens_details.cached_tokens > 0.5 * usage.prompt_tokens
    assert anchor + 0.2 * (info["logical_tokens"] - anchor) - 1 <= info["slots_held"] < 0.6 * info["logical_tokens"]
    numbers(server)


def test_an_agent_calls_tools_in_the_models_own_format(server):
    """examples/agent_openai.py with the model's own chat template."""
    flush(server)
    options = ("--tool-choice", "required", "--steps", "1", "--max-tokens", "40")
    out, infos = run_example("agent_openai.py", "--base-url", server.base_url, *options)
    assert len(calls(out)) >= 2 and len(infos) == 4
    assert infos[-1]["cached_compressed_tokens"] > 0 and infos[-1]["slots_held"] < 0.8 * infos[-1]["logical_tokens"]
    flush(server)
