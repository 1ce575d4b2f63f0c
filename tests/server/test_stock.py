"""Budget 1 and `enabled: false` against stock SGLang: no cache and no attention backend of ours.

5e-5 in logprobs: both compute in float32 and sum attention in a different order.
"""

from __future__ import annotations

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.top.command import OFF
from tests.support.client import Answer, body, flush, generate, numbers, tokens

pytestmark = pytest.mark.server
BOUND = 5e-5


@pytest.fixture(scope="module")
def prompts(text_tokens) -> list[list[int]]:
    return [text_tokens[:40], text_tokens[200:900], tokens(300, 7), text_tokens[200:900] + text_tokens[1000:1100]]


@pytest.fixture(scope="module")
def stock(launch, prompts) -> list[Answer]:
    server = launch("--max-total-tokens", "6000")
    status, info = server.get_json("/server_info")
    assert status == 200 and info["attention_backend"] == "torch_native" and "keepkv" not in info["internal_states"][0]
    status, answer = server.post_json("/generate", body(prompts[0], 2, {"budget": 0.5}))
    assert status == 400 and "--enable-keepkv" in answer["error"]["message"]
    assert cli.main(["top", server.base_url, "--once"]) == OFF
    assert cli.main(["verify", server.base_url]) == 2, "nothing of KeepKV to verify"
    return [generate(server, prompt, 32) for prompt in prompts]


@pytest.fixture(scope="module")
def server(launch, stock):
    return launch("--enable-keepkv", "--keepkv-budget", "0.1", "--max-total-tokens", "6000")


@pytest.mark.parametrize("keepkv", [{"enabled": False}, {"budget": 1}, {"budget": 1.0, "merge": "mean"}], ids=str)
def test_same_tokens_and_logprobs_as_stock(server, stock, prompts, keepkv):
    flush(server)
    for prompt, expected in zip(prompts, stock, strict=True):
        got = generate(server, prompt, 32, keepkv)
        assert got.ids == expected.ids
        assert max(abs(a - b) for a, b in zip(got.logprobs, expected.logprobs, strict=True)) <= BOUND
        assert got.cached == expected.cached
        assert got.keepkv["compressions"] == 0 and got.keepkv["slots_held"] == got.keepkv["logical_tokens"]
    numbers(server)
