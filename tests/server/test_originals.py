"""Originals in host memory on a live server: a later turn is read over the whole history (docs/originals.md)."""

from __future__ import annotations

from typing import Any

import pytest

from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.client import Answer, flush, generate, numbers, tokens

pytestmark = pytest.mark.server
SIZE = ("--max-total-tokens", "4000")
BUDGET = ("--enable-keepkv", "--keepkv-budget", "0.2")
BOUND = 1e-4  # both compute in float32 and sum attention in a different order
TURNS = 5
TOP = 20
QUERIES = 32 + 256  # window and references: so much is computed in any case


def conversation(server: ServerProcess, text: list[int], replies: list[int], **keepkv: Any) -> list[Answer]:
    """TURNS turns with replies of one token. replies: those that are put into the history, so that all servers read the
    same text; empty: the server's own."""
    prompt: list[int] = []
    made = []
    for turn in range(TURNS):
        prompt = prompt + text[500 * turn : 500 * turn + (600 if turn == 0 else 150)]
        made.append(generate(server, prompt, 1, keepkv or None, top_logprobs_num=TOP))
        prompt = [*prompt, replies[turn] if replies else made[-1].ids[0]]
    return made


def apart(one: Answer, other: Answer) -> float:
    """Largest difference in log-probability over the five most probable tokens of the other; of one that is not among
    the first answer's TOP, at least so much."""
    first, second = ({t: p for p, t, _ in a.meta["output_top_logprobs"][0]} for a in (one, other))
    least = min(first.values())
    return max(abs(first.get(token, least) - second[token]) for token in sorted(second, key=second.get)[-5:])


@pytest.fixture(scope="module")
def stock(launch, text_tokens) -> list[Answer]:
    return conversation(launch(*SIZE), text_tokens, [])


@pytest.fixture(scope="module")
def replies(stock) -> list[int]:
    return [answer.ids[0] for answer in stock]


@pytest.fixture(scope="module")
def server(launch, stock) -> ServerProcess:
    return launch(*BUDGET, *SIZE, "--keepkv-host-ratio", "4", "--chunked-prefill-size", "128")


def test_nothing_is_lost(server, stock, replies, text_tokens):
    """H4: turn by turn the log-probabilities of stock SGLang, whatever was compressed in between."""
    made = conversation(server, text_tokens, replies)
    for turn, (answer, expected) in enumerate(zip(made, stock, strict=True)):
        assert apart(answer, expected) <= BOUND, turn
        assert answer.keepkv["compressions"] == 1
        assert answer.keepkv["slots_held"] <= 0.2 * answer.keepkv["logical_tokens"] + 2
    assert [answer.keepkv["unpacked_tokens"] > 0 for answer in made] == [False] + [True] * (TURNS - 1)
    # Without the originals the same turns are not what stock says.
    flush(server)
    compressed = conversation(server, text_tokens, replies, unpack=False)
    assert max(apart(answer, expected) for answer, expected in zip(compressed, stock, strict=True)) > 100 * BOUND
    assert not any(answer.keepkv["unpacked_tokens"] for answer in compressed)
    state = numbers(server)
    assert state["counters"]["unpacked"] == TURNS - 1 and not state["counters"]["archive_gaps"]
    assert state["originals"]["unpacked_slots"] == 0


def test_without_slots_the_history_is_streamed(server, stock, replies, text_tokens):
    """H4 of what finds no slots: read from host memory, layer by layer, and compressed from there."""
    flush(server)
    before = numbers(server)["counters"]
    made = conversation(server, text_tokens, replies, unpack=0.001)
    for turn, (answer, expected) in enumerate(zip(made, stock, strict=True)):
        assert apart(answer, expected) <= BOUND, turn
        assert answer.keepkv["compressions"] == 1
        assert answer.keepkv["slots_held"] <= 0.2 * answer.keepkv["logical_tokens"] + 2
    assert [answer.keepkv["unpacked_tokens"] > 0 for answer in made] == [False] + [True] * (TURNS - 1)
    counters = numbers(server)["counters"]
    assert counters["streamed"] - before["streamed"] == TURNS - 1 and counters["unpacked"] == before["unpacked"]
    assert counters["unpack_no_room"] == before["unpack_no_room"]


def test_an_evicted_conversation_comes_back(server, text_tokens):
    """Its slots are gone, its originals are not: only what is new is computed, and that right."""
    flush(server)
    first, more = text_tokens[:800], text_tokens[2000:2100]
    generate(server, first, 1)
    expected = generate(server, first + more, 1, top_logprobs_num=TOP)
    flush(server)
    generate(server, first, 1)
    for seed in range(3):  # fills the pool
        generate(server, tokens(3300, seed), 1, {"enabled": False})
    answer = generate(server, first + more, 1, top_logprobs_num=TOP)
    assert answer.keepkv["unpacked_tokens"] > 0 and answer.cached >= 600
    assert apart(answer, expected) <= BOUND
    numbers(server)


def test_half_a_turn_that_is_shared_comes_from_the_archive(server, text_tokens):
    """A compressed span matches whole or not at all; its originals are shared token by token, 64 at a time."""
    flush(server)
    generate(server, text_tokens[:700], 1)
    parted = text_tokens[:400] + tokens(200, 11)
    answer = generate(server, parted, 1, top_logprobs_num=TOP)
    assert answer.cached == answer.keepkv["unpacked_tokens"] == 600 - 1 - QUERIES  # 384 of them are archived
    flush(server)
    assert apart(answer, generate(server, parted, 1, top_logprobs_num=TOP)) <= BOUND
    assert generate(server, parted, 1, extra_key="other").cached == 0  # H7
    numbers(server)


@pytest.mark.soak
def test_an_archive_that_is_too_small_changes_nothing(launch, replies, text_tokens):
    """H6: with 1 MB of host memory, two blocks, the answers are those of a server without originals."""
    small = launch(*BUDGET, *SIZE, "--keepkv-host-size", "0.001", "--keepkv-host-dtype", "int4")
    answers, state = conversation(small, text_tokens, replies), numbers(small)
    assert state["originals"]["blocks"] == 2 and state["counters"]["archive_full_tokens"] > 0
    without = conversation(launch(*BUDGET, *SIZE), text_tokens, replies)
    for one, other in zip(answers, without, strict=True):
        assert one.ids == other.ids and apart(one, other) == 0
        assert one.keepkv["unpacked_tokens"] == 0


@pytest.mark.soak
def test_three_ranks_answer_as_one(launch, stock, replies, text_tokens):
    """H8: ranks keep the same blocks and unpack the same histories; each checks its own memory (client.STRICT)."""
    kept = (*BUDGET, *SIZE, "--keepkv-host-ratio", "4")
    alone = conversation(launch(*kept), text_tokens, replies)
    bind = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|1"}  # SGLang otherwise wants a NUMA node for each
    ranks = launch(*kept, "--tp-size", "3", env=bind)
    together = conversation(ranks, text_tokens, replies)
    for one, three, expected in zip(alone, together, stock, strict=True):
        assert apart(three, expected) <= BOUND
        assert three.keepkv["unpacked_tokens"] == one.keepkv["unpacked_tokens"]
    numbers(ranks)
    flush(ranks)
