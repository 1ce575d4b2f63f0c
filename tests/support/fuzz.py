"""custom_params that no client would think of, and what a server must do with them: answer, or refuse with an HTTP 400.

run() draws them with hypothesis and sends each to a live server.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from keepkv_sglang.compress import registry
from keepkv_sglang.settings.config import OPTIONS
from keepkv_sglang.settings.protect import SYSTEM
from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.client import flush, generate, tokens
from tests.support.memory import resident_bytes

TEXT = st.text(st.characters(), max_size=20)  # lone surrogates too: JSON can spell them
NUMBERS = st.one_of(
    st.integers(-2, 300), st.integers(-(10**400), 10**400), st.floats(-0.1, 1.1), st.floats(), st.booleans()
)
JSON = st.recursive(
    st.none() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
# Deeper than Python's stack SGLang's own parsers answer 500, without KeepKV too. As text: json.dumps would recurse.
DEEP = st.integers(1, 900).map(lambda depth: "[" * depth + "]" * depth)
RANGES = st.lists(
    st.sampled_from((SYSTEM, "", "x", "9-5"))
    | st.tuples(st.integers(0, 200), st.integers(0, 200)).map(lambda pair: f"{min(pair)}-{max(pair) + 1}"),
    max_size=5,
).map(",".join)
NAMES = st.sampled_from((*registry.SCORERS.names, *registry.MERGE_RULES.names, "os:getcwd", "a.b:c"))
VALUES = NUMBERS | RANGES | NAMES | JSON
KEEPKV = st.dictionaries(st.sampled_from(sorted(OPTIONS)) | TEXT, VALUES, max_size=4)
CUSTOM = st.one_of(
    KEEPKV.map(lambda keepkv: {"keepkv": keepkv}),
    JSON.map(lambda keepkv: {"keepkv": keepkv}),
    st.dictionaries(TEXT, JSON, max_size=3),
    JSON,
)
PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
CHAT = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": PROMPT}]}
# (path, body without custom_params, custom_params in sampling_params instead of at the top)
ENDPOINTS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("/generate", {"text": PROMPT, "sampling_params": {"max_new_tokens": 2}}, True),
    ("/v1/completions", {"model": "m", "prompt": PROMPT, "max_tokens": 2}, False),
    ("/v1/chat/completions", CHAT, False),
    ("/v1/messages", CHAT, False),
)
MARK = "CUSTOM PARAMS GO HERE"


def request_text(request: dict[str, Any], nested: bool, custom: str) -> str:
    """The body as JSON text, with the text of custom_params put in."""
    if nested:
        request = {**request, "sampling_params": {**request["sampling_params"], "custom_params": MARK}}
    else:
        request = {**request, "custom_params": MARK}
    return json.dumps(request).replace(json.dumps(MARK), custom)


def run(server: ServerProcess, examples: int) -> tuple[dict[int, int], int]:
    """Sends so many to the server -> (answers by HTTP status, bytes that its memory grew by in the second half)."""
    statuses: dict[int, int] = {}
    sizes: list[int] = []
    sent = 0
    ids = tokens(150, 77)
    flush(server)
    before = generate(server, ids, 4)

    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate], derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(ENDPOINTS), CUSTOM.map(json.dumps) | DEEP)
    def send(endpoint: tuple[str, dict[str, Any], bool], custom: str) -> None:
        nonlocal sent
        path, request, nested = endpoint
        text = request_text(request, nested, custom)
        status, answer = server.post_text(path, text)
        assert status in (200, 400), (path, custom[:300], status, answer)
        if "different settings are in use" in str(answer):
            flush(server)
        statuses[status] = statuses.get(status, 0) + 1
        sent += 1
        if sent == examples // 2:
            sizes.append(resident_bytes(server))

    send()
    grown = resident_bytes(server) - sizes[0]
    flush(server)
    after = generate(server, ids, 4)
    assert (after.ids, after.logprobs, after.cached) == (before.ids, before.logprobs, before.cached)
    return statuses, grown
