"""What clients do. An action returns its outcome in words; anything wrong raises."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.soak import control
from tests.soak.load import Disturbed, Soak
from tests.soak.oracle import BOUND, NEW, OFF, alone, uncompressed
from tests.support.bad_input import REQUESTS
from tests.support.client import Answer, body

SETTINGS: tuple[dict[str, Any] | None, ...] = (
    None, OFF, {"budget": 0.1}, {"budget": 60}, {"budget": 0.5, "heads": "uniform"}, {"heads": "layer"},
    {"merge": "evict", "scorer": "snapkv"}, {"merge": "mean", "heads": "uniform"}, {"merge": "least_squares"},
    {"scorer": "keydiff", "interval": 16}, {"unpack": False}, {"unpack": 0.001}, {"budget": 1},
    {"protect": "20-50,200-230"}, {"fair": "0-40,40-90"}, {"span_tokens": 96, "interval": 16},
)  # fmt: skip
"""Budgets, rules, scorers, heads, originals: few enough that the server's bound on configurations is not met."""


def text_of(soak: Soak, rng: random.Random, least: int, most: int) -> list[int]:
    """A beginning of a document: others ask for it, too."""
    text = rng.choice(soak.texts)
    return text[: rng.randrange(least, most)]


def off(soak: Soak, rng: random.Random) -> str:
    """KeepKV off: what a quiet server answers. Behind a salt, or sharing what others have cached."""
    quiet = rng.choice(soak.oracle.prompts)
    request = uncompressed(quiet)
    answer = soak.generate(alone(request) if rng.random() < 0.3 else request, rng)
    apart = soak.oracle.worst(quiet, answer)
    assert apart <= BOUND, f"an uncompressed prompt of {len(quiet.ids)} tokens is {apart:.2g} off"
    soak.tally.most("largest difference, uncompressed", apart)
    return "as a quiet server"


def cold(soak: Soak, rng: random.Random) -> str:
    """A prompt that nobody has cached but somebody behind another salt: its first token comes from the uncompressed
    prompt, whatever the settings."""
    quiet, keepkv = rng.choice(soak.oracle.prompts), rng.choice(SETTINGS)
    soak.generate(alone(body(quiet.ids, 1, keepkv)), rng)
    answer = soak.generate(alone(body(quiet.ids, rng.randrange(1, 60), keepkv)), rng)
    if answer.retractions:
        return "retracted"  # its prompt may have been read again, over what was compressed of it
    assert answer.cached == 0, f"{answer.cached} tokens found behind a salt that nobody has"
    return _first_token(soak, answer, quiet.answer[0], quiet.logprobs[0], quiet.gaps[0])


def _first_token(soak: Soak, answer: Answer, token: int, logprob: float, gap: float) -> str:
    apart = abs(answer.logprobs[0] - logprob)
    same = answer.ids[0] == token or gap <= 2 * BOUND
    assert same and apart <= BOUND, f"first token {answer.ids[0]}, not {token}, {apart:.2g} off: {answer.keepkv}"
    soak.tally.most("largest difference, first tokens", apart)
    return "first token as uncompressed"


def over_originals(soak: Soak, rng: random.Random) -> str:
    """The second turn of a conversation whose history was compressed. With originals bit for bit its first token is
    that of an uncompressed prompt; where they were not there it is not compared."""
    quiet = max(rng.sample(soak.oracle.prompts, 3), key=lambda prompt: len(prompt.ids))
    cut = rng.randrange(64, max(65, len(quiet.ids) - 10))
    unpack = rng.choice((0.5, 0.5, 0.001))
    first = alone(body(quiet.ids[:cut], 1, {"unpack": unpack, "window": 8, "references": 8}))
    soak.generate(first, rng)
    answer = soak.generate(body(quiet.ids, NEW, {"unpack": unpack, "window": 8, "references": 8},
                                cache_salt=first["cache_salt"]), rng)  # fmt: skip
    read, hit = answer.keepkv["unpacked_tokens"], answer.keepkv["cached_compressed_tokens"]
    if answer.retractions:
        return "retracted"
    if hit and not read:
        return "read compressed"
    if not soak.shape.exact and read:
        return "read over int4"
    return f"{'over originals' if read else 'cold'}: " + _first_token(
        soak, answer, quiet.answer[0], quiet.logprobs[0], quiet.gaps[0]
    )


def conversation(soak: Soak, rng: random.Random) -> str:
    """Up to four turns on a document that others talk about too, with settings of their own."""
    keepkv = rng.choice(SETTINGS)
    ids = text_of(soak, rng, 40, 200)
    source, turns = rng.choice(soak.texts), rng.randrange(1, 5)
    for _ in range(turns):
        answer = soak.generate(body(ids, rng.randrange(1, 48), keepkv), rng)
        at = rng.randrange(0, 1500)
        ids = ids + answer.ids + source[at : at + rng.randrange(10, 100)]
        whole = keepkv in (OFF, {"budget": 1})
        if len(ids) + 60 > (min(soak.shape.longest, soak.shape.pool // 2) if whole else soak.shape.longest):
            break
    return "answered"


def longer_than_the_pool(soak: Soak, rng: random.Random) -> str:
    """It is compressed between its chunks."""
    ids = [token for text in rng.sample(soak.texts, 3) for token in text]
    ids = ids[: soak.shape.pool + rng.randrange(50, 200)]
    soak.generate(body(ids, rng.randrange(1, 20), {"budget": 0.1}), rng)
    return "answered"


def does_not_fit(soak: Soak, rng: random.Random) -> str:
    """The same uncompressed is refused."""
    ids = [token for text in soak.texts[:4] for token in text][: soak.shape.pool + 50]
    status, data = soak.server.post_json("/generate", soak.prepare(body(ids, 4, OFF), rng))
    assert status == 400 and "tokens" in str(data), (status, data)
    return "refused"


def cut_stream(soak: Soak, rng: random.Random) -> str:
    """The client goes away: before the first token, or after some."""
    request = body(text_of(soak, rng, 40, 300), 200, rng.choice(SETTINGS))
    with soak.stream(request, rng) as answer:
        for _ in range(rng.choice((0, 0, 1, 4, 20))):
            answer.readline()
    return "cut"


def abort(soak: Soak, rng: random.Random) -> str:
    """/abort_request at any phase: it waits, it is read, it decodes, it has ended."""
    request = body(text_of(soak, rng, 100, 400), rng.randrange(1, 120), rng.choice(SETTINGS))
    ended: list[str] = []

    def send() -> None:
        began = time.monotonic()
        status, data = soak.server.post_json("/generate", soak.prepare(request, rng), timeout_s=180)
        try:
            soak.judge(status, data, began, abort=True)
            ended.append("ended before")
        except Disturbed as disturbed:
            ended.append(str(disturbed))
        except AssertionError as error:
            ended.append(str(error))

    thread = control.started(send)
    time.sleep(rng.choice((0, 0.02, 0.2, 1, 3)))
    soak.server.post_json("/abort_request", {"rid": request["rid"]})
    thread.join(180)
    assert ended, "an aborted request never came back"
    assert ended[0] in ("ended before", "aborted") or "injected" in ended[0], ended[0]
    return ended[0]


def samples(soak: Soak, rng: random.Random) -> str:
    request = body(text_of(soak, rng, 80, 180), rng.randrange(2, 40), rng.choice(SETTINGS)) | {"rid": None}
    request["sampling_params"] |= {"n": rng.randrange(2, 4), "temperature": 0.8}
    parts = soak.ask(request, rng)
    assert len(parts) == request["sampling_params"]["n"]
    assert all(len(part["output_ids"]) == request["sampling_params"]["max_new_tokens"] for part in parts)
    return "answered"


def stop(soak: Soak, rng: random.Random) -> str:
    """Stop strings and stop tokens: what is behind them is not in the answer."""
    request = body(text_of(soak, rng, 60, 180), 60, rng.choice(SETTINGS))
    word = rng.choice((" the", ".", "\n", " a", "e"))
    request["sampling_params"] |= {"stop": [word], "ignore_eos": False}
    data = soak.ask(request, rng)
    reason = data["meta_info"]["finish_reason"]
    if reason["type"] == "stop" and reason["matched"] == word:
        assert word not in data["text"], (word, data["text"][-50:])
        return "stopped"
    return "no stop came"


def input_logprobs(soak: Soak, rng: random.Random) -> str:
    """Of a prompt that may be cached compressed: those of an uncompressed one."""
    quiet = rng.choice(soak.oracle.prompts)
    keepkv = rng.choice(SETTINGS)
    if len(quiet.ids) > soak.shape.pool // 2:
        return "too long here"
    data = soak.ask(body(quiet.ids, 2, keepkv, logprob_start_len=0), rng)
    got = [entry[0] for entry in data["meta_info"]["input_token_logprobs"][1:]]
    assert len(got) == len(quiet.inputs), (len(got), len(quiet.inputs))
    apart = max(abs(one - other) for one, other in zip(got, quiet.inputs, strict=True))
    assert apart <= BOUND, f"input logprobs are {apart:.2g} off with {keepkv}"
    soak.tally.most("largest difference, input logprobs", apart)
    return "as uncompressed"


SCHEMA = json.dumps({
    "type": "object", "required": ["lines"],
    "properties": {"lines": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0},
                             "minItems": 8, "maxItems": 8}},
})  # fmt: skip


def structured(soak: Soak, rng: random.Random) -> str:
    request = body(text_of(soak, rng, 80, 180), 120, rng.choice(SETTINGS))
    request["sampling_params"] |= {"json_schema": SCHEMA, "ignore_eos": False}
    data = soak.ask(request, rng)
    if data["meta_info"]["finish_reason"]["type"] != "stop":
        return "cut at its length"
    assert len(json.loads(data["text"])["lines"]) == 8
    return "as its schema says"


def bad(soak: Soak, rng: random.Random) -> str:
    value, _ = rng.choice(REQUESTS)
    opened = {"window", "references", "interval", "min_tokens", "span_tokens", "chunk"}  # --keepkv-request-keys
    if isinstance(value, dict) and opened & set(value):
        return "not asked"
    request = body(text_of(soak, rng, 20, 60), 2, value)
    status, data = soak.server.post_json("/generate", soak.prepare(request, rng))
    assert status == 400, (value, status, data)
    return "refused"


@dataclass(frozen=True)
class Action:
    name: str
    weight: float
    run: Callable[[Soak, random.Random], str]


ACTIONS = [
    Action("uncompressed beside compressed", 6, off),
    Action("cold and compressed", 5, cold),
    Action("second turn over originals", 5, over_originals),
    Action("conversation", 6, conversation),
    Action("prompt longer than the pool", 0.5, longer_than_the_pool),
    Action("prompt that does not fit", 0.5, does_not_fit),
    Action("stream cut by the client", 3, cut_stream),
    Action("abort at any phase", 3, abort),
    Action("n > 1", 1.5, samples),
    Action("stop string", 1.5, stop),
    Action("input logprobs", 1.5, input_logprobs),
    Action("structured output", 1, structured),
    Action("bad value", 1, bad),
    Action("flush_cache", 0.7, control.flush_cache),
    Action("pause and continue", 0.7, control.pause),
    Action("weights replaced", 0.3, control.weights),
    Action("abort of everything", 0.2, control.abort_all),
    Action("no slots, no blocks", 1.5, control.exhaust),
    Action("error in mid-way", 1, control.break_something),
]
