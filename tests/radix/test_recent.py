"""Recent tokens: raw behind the compressed span, inside its budget, and compressed with what follows."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from keepkv_sglang.radix.adapter.eviction import FULL
from keepkv_sglang.runtime import pressure
from keepkv_sglang.tools.simulate.traces import BORDER
from tests.support.served import OFF, SYSTEM, Server, serving, text

RECENT = 6


@pytest.fixture
def server(request) -> Iterator[Server]:
    values = {"recent": RECENT, "references": 0, "pressure": "merge", "pressure_free": 0.5}
    with serving(**values | getattr(request, "param", {})) as server:
        yield server


def chain(server: Server, prompt: list[int], kind: Any = None) -> list[tuple[int, int, int, bool]]:
    """(tokens, slots, lookahead, raw) of the spans that a request with this prompt finds."""
    req = server.admit(prompt, 1, kind)
    found = [(span.n, span.m, span.lookahead, span.raw) for span in req.last_node.path()]
    server.world.abort(req)
    return found


def test_a_turn_leaves_its_recent_tokens_to_the_next(server):
    first = [*SYSTEM, *text(200, 100), BORDER, 5]  # 101 tokens behind the anchor, the last belongs to the reply
    server.run(first)
    assert chain(server, first) == [(95, 26 - RECENT, RECENT, False), (RECENT, RECENT, 0, True)]
    reply = text(9000, 4)[:3]  # the last token of a reply is never run
    second = [*first, *reply, *text(300, 40), BORDER, 5]
    assert server.run(second) == len(first) + 3, "all of the first turn is found"
    new = 1 + 3 + 41  # the prompt's last token, the reply, the next prompt
    kept = -(-new // 4)
    assert chain(server, second) == [
        (95, 20, RECENT, False),
        (new, kept, RECENT, False),  # RECENT tokens come in, RECENT stay out: the budget of what is new
        (RECENT, RECENT, 0, True),
    ]
    assert chain(server, first)[-1] == (RECENT, RECENT, 0, True), "others may still go on from the first turn"


def test_slots_of_a_long_conversation_are_the_budget_of_all_its_tokens(server):
    prompt, total = [*SYSTEM, *text(200, 60), BORDER, 5], 61
    for turn in range(1, 7):
        server.run(prompt)
        (*spans, tail) = chain(server, prompt)
        slots = sum(m for _, m, _, _ in spans) + tail[1]
        assert abs(slots - total / 4) <= turn, "one rounding up per turn"
        prompt = [*prompt, *text(9000, 4)[:3], *text(1000 * turn, 40), BORDER, 5]
        total += 1 + 3 + 41


def test_short_turns_with_long_replies_leave_nothing_raw_behind(server):
    """A turn below min_tokens is compressed with its reply, together with the recent tokens before it."""
    prompt, total = [*SYSTEM, *text(200, 60), BORDER, 5], 61
    for turn in range(1, 6):
        server.run(prompt, reply=35)
        prompt = [*prompt, *text(9000, 34), BORDER, 5]  # 2 tokens of the reply wait, and 2 of the next prompt
        total += 1 + 34
        spans = chain(server, prompt)
        assert [raw for _, _, _, raw in spans].count(True) == 2, "the end of this turn"
        slots = sum(m for _, m, _, _ in spans)
        assert slots <= total / 4 + 2 * turn + 16, "at most one interval is raw"
        total += 1


def test_a_prompt_that_ends_otherwise_finds_nothing_of_the_compressed_span(server):
    """Queries of the recent tokens chose what the span keeps: showing it to another end would tell of them."""
    first = [*SYSTEM, *text(200, 100), BORDER, 5]
    server.run(first)
    cut = len(first) - 1 - RECENT
    for at in range(cut, len(first) - 1):
        assert server.cached([*first[:at], 777, *first[at + 1 :], *text(400, 10)]) == len(SYSTEM)
    assert server.cached([*first[:-1], 777, *text(400, 10)]) == len(first) - 1


def test_a_twin_and_its_reply_go_on_as_the_first_did(server):
    once, twin = ([*SYSTEM, *text(first, 100), BORDER, 5] for first in (200, 400))
    server.run(once, reply=40)
    server.run(twin, reply=1)
    assert server.run(twin, reply=40) == len(twin) - 1
    chains = [chain(server, [*prompt, *text(9000, 39), 1]) for prompt in (once, twin)]
    # 16 tokens of reply make 4 slots; as many tokens as came in raw stay raw; two intervals are one entry.
    assert chains[0][1:] == [(32, 8, RECENT, False), (RECENT, RECENT, 0, True), (40 - 32, 40 - 32, 0, True)]
    assert chains[1] == chains[0]


def test_without_the_raw_tokens_the_compressed_span_is_found_and_the_budget_is_the_same(server):
    first = [*SYSTEM, *text(200, 100), BORDER, 5]
    server.run(first, reply=1)
    tail = next(span for span in server.tree.spans.spans() if span.raw)
    server.tree.drop_spans(server.tree.spans.drop_subtree(tail), {FULL: 0})
    assert server.cached(first) == len(first) - 1 - RECENT
    second = [*first, *text(300, 44), BORDER, 5]
    assert server.run(second) == len(first) - 1 - RECENT
    assert [m for _, m, _, _ in chain(server, second)] == [20, -(-(1 + 45) // 4), RECENT]


def test_a_retracted_reply_is_found_with_its_recent_tokens(server):
    prompt = [*SYSTEM, *text(200, 100), BORDER, 5]
    req = server.admit(prompt, 40)
    assert server.world.prefill(req)
    server.world.prefilled(req)
    req.output_ids.append(9000)
    while req.kv.kv_committed_len + server.world._state(req).offset < len(prompt) - 1 + 20:
        server.world._decode(req, 1)
        req.output_ids.append(9000 + len(req.output_ids))
        server.world._compress(req)
    assert server.world._state(req).counted_tokens == len(prompt) - 1 + 16
    server.world.retract(req)
    assert server.cached([*prompt, *text(9000, 40)]) >= len(prompt) - 1 + 16
    assert array("q", prompt) == req.origin_input_ids


def test_a_share_of_the_budget_is_kept_for_good(server):
    first = [*SYSTEM, *text(200, 100), BORDER, 5]
    server.run(first, kind={"fair": "120-142"})
    assert [lookahead for _, _, lookahead, _ in chain(server, first, {"fair": "120-142"})] == [0]


def test_a_released_row_leaves_no_tail_behind(server):
    """Admission asks for slots before the next row begins: a retracted request counts as a new one."""
    req = server.admit([*SYSTEM, *text(200, 100), BORDER, 5], 4)
    assert server.world.prefill(req)
    server.world.prefilled(req)
    state = server.world._state(req)
    assert state.counted_tokens == 142 and state.carried == RECENT
    server.world.abort(req)
    assert (state.counted_tokens, state.carried, state.merged_tokens) == (0, 0, 0)


@pytest.mark.parametrize("server", [{"recent": 24}], indirect=True)
def test_what_a_short_interval_leaves_raw_is_one_span(server):
    """24 recent tokens reach from behind a reply's 16 into the prompt; pressure leaves them to the next turn."""
    prompt = [*SYSTEM, *text(200, 300), BORDER, 5]
    server.run(prompt, reply=18)
    spans = chain(server, [*prompt, *text(9000, 17), 1])
    assert [(n, lookahead) for n, _, lookahead, _ in spans[-3:]] == [(16, 24), (24, 0), (2, 0)]
    tree = server.tree
    assert not any(span.raw and span.n == 24 for span in tree.book.raw.values())


@pytest.mark.parametrize("order", [[None, OFF, None], [OFF, OFF, None]])
def test_an_uncompressed_copy_of_a_span_and_its_recent_tokens_is_merged(server, monkeypatch, order):
    """Pressure merges the copy; what hung below it hangs below the recent tokens, or is dropped."""
    monkeypatch.setattr(pressure, "is_cold", lambda spans, last: True)
    monkeypatch.setattr(pressure, "merge_unused", lambda *args: None)
    body = [*SYSTEM, *text(200, 100), BORDER]
    for turn, kind in enumerate(order):
        server.run([*body, 5 + (turn if kind else 0)], kind=kind, reply=12)
    waiting = SimpleNamespace(origin_input_ids=range(900))
    monkeypatch.setattr(server.rt.scheduler, "waiting_queue", [waiting], raising=False)
    for _ in range(6):
        pressure.relieve(server.rt)
        server.tree.check()
    assert server.rt.counters.pressure_merges
    assert server.cached([*body, 5, 7]) >= len(SYSTEM)
