"""Multi-turn rows: slots after every turn, finished turns untouched, conversations cut where replies are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.conversation import end_tokens, message, pieces, rendered
from keepkv_sglang.tools.evaluate.conversation_row import ConversationRow
from keepkv_sglang.tools.evaluate.documents import HALVES
from keepkv_sglang.tools.evaluate.methods import ours, slots_of
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.repeated import InPieces, feed_in_pieces
from keepkv_sglang.tools.evaluate.task import Setup
from keepkv_sglang.tools.evaluate.turns import SYSTEM, TURNS, Turns, make_item, messages_of
from keepkv_sglang.turn.anchor import MessageBorder
from tests.tools.unpadded import unpadded

CONFIG = KeepKVConfig(enabled=True)


BORDER = MessageBorder(2, 0)  # the demo model's <|im_end|>


def with_anchor(ids: list[int], anchor: int) -> list[int]:
    """A text whose first `anchor` tokens are a message of their own."""
    return [*ids[: anchor - 1], BORDER.token, *ids[anchor:]]


def test_slots_after_every_turn(probe: Probe, ids: list[int]):
    """anchor + sum of ceil(budget * n) over compressed spans; a span of fewer than min_tokens joins the next. Recent
    tokens are inside, at most half of the first span's slots or as many as came in, and join the next as well. The last
    token of a reply comes with the next prompt."""
    anchor, budget, at = 20, 0.2, 0
    ids = with_anchor(ids, anchor)
    row = ConversationRow(probe.row(), replace(CONFIG, budget=budget), BORDER)
    turns = [(100, 30), (40, 10), (20, 5), (70, 12)]  # (prompt, reply) tokens; the first prompt has the anchor
    spans, raw, finished = 0, -anchor - 1, None
    for prompt, reply in turns:
        row.prompt(ids[at : at + prompt])
        state = row.state
        assert state is not None and state.anchor_len == anchor
        raw += prompt
        if raw >= CONFIG.min_tokens:
            spans, raw = spans + slots_of(budget, raw), 0
        assert row.row.slots == anchor + spans + raw
        assert state.tail_slots == anchor + spans - state.carried
        if finished is not None:  # finished turns are bit for bit what they were
            for old, new in zip(finished, row.row.layers, strict=True):
                assert all(torch.equal(a, b[: len(a)]) for a, b in zip(old, new, strict=True))
        finished = [slots.cut(0, state.tail_slots) for slots in row.row.layers]
        assert row.reply(ids[at + prompt : at + prompt + reply]).shape[0] == reply
        raw += reply
        at += prompt + reply
        assert row.row.tokens == at - 1
    assert spans == sum(slots_of(budget, n) for n in (79, 70, 105))  # the third turn's 30 tokens waited
    carried = 0
    for n in (79, 70, 105):
        carried = min(CONFIG.recent, max(carried, (slots_of(budget, n) + carried) // 2))
    assert row.spans[-1].left == carried


def test_a_long_reply_is_compressed_at_every_interval(probe: Probe, ids: list[int]):
    """120 tokens of reply at interval 32: compressed before decoding goes on behind 32, 64 and 96 of them."""
    config = replace(CONFIG, interval=32, window=8, budget=0.25)
    row = ConversationRow(probe.row(), config, BORDER)
    row.prompt(ids[:80])
    assert row.reply(ids[80:200]).shape[0] == 120
    assert [span.end for span in row.spans] == [79, 79 + 32, 79 + 64, 79 + 96]
    assert [span.is_prompt for span in row.spans] == [True, False, False, False]
    assert row.row.slots == slots_of(0.25, 79) + sum(slots_of(0.25, 32) for _ in range(3)) + 120 - 96


def test_full_budget_is_the_full_cache(probe: Probe, ids: list[int]):
    row, full = ConversationRow(probe.row(), replace(CONFIG, budget=1.0), None), probe.row()
    for at in (0, 80):
        row.prompt(ids[at : at + 70])
        full.feed(ids[full.tokens : row.row.tokens])
        assert torch.equal(row.reply(ids[at + 70 : at + 80]), full.feed(ids[full.tokens : at + 79]))


def test_messages_of():
    text = "user: Hi: there\nand more\nassistant: None\ntool: {}\nassistant: Yes.\nuser: no user: here"
    assert [(m["role"], m["content"]) for m in messages_of(text)] == [
        ("user", "Hi: there\nand more"), ("tool", "{}"), ("assistant", "Yes."), ("user", "no user: here"),
    ]  # fmt: skip


def test_pieces_are_the_rendered_chat(probe: Probe):
    said = [message("system", "S"), message("user", "Hello."), message("assistant", "Yes, what?"), message("user", "A")]
    cut = pieces(probe, [(said[:2], True), (said[2:3], False), (said[3:], True)])
    assert probe.tokenizer.decode([i for piece in cut for i in piece]) == rendered(probe, said, True)
    assert probe.tokenizer.decode(cut[1]).startswith("Yes, what?")
    assert cut[1][-2] in end_tokens(probe) or cut[1][-1] in end_tokens(probe)


def test_the_report_compares_originals_with_off():
    """By token over turns 2 to 6; rows of before say nothing of first tokens."""

    def row(item: int, top1: float, kl: float, **more: object) -> dict[str, object]:
        columns = {"kl": [kl] * TURNS, "top1": [top1] * TURNS, "slots": [50] * TURNS, "tokens": [100] * TURNS}
        columns["reply_tokens"] = [10 * item] * TURNS
        return {"method": "default", "budget": 0.2, "item": item, "anchor": 5, "once_kl": 0.1, "once_top1": 0.5} | (
            columns | more
        )

    first = {"first_kl": [0.0] * TURNS, "first_top1": [1.0] * TURNS}
    old = [row(1, 0.5, 0.2), row(3, 0.5, 0.2)]
    assert "Originals" not in Turns().report(old)
    new = [row(1, 0.5, 0.1, originals="native", **first), row(3, 0.7, 0.1, originals="native", **first)]
    report = unpadded(Turns().report(old + new))
    assert "| default | 20% | off | 2 | 50 | 50.0 [50.0, 50.0] | - | - | - | - |" in report
    assert "| native | 2 | 50 | 65.0 [50.0, 70.0] | 15.0 [0.0, 20.0] | 0.50 [0.50, 0.50] | - | - |" in report
    report = unpadded(Turns().report([row | first for row in old] + new))
    gained = 100 * (0.2 * 30) / (9 + 29)  # one more of both replies' tokens agrees in either
    assert f"| 0.50 [0.50, 0.50] | {gained:.1f} [" in report and "**default, originals native, 20%: 2 conv" in report


def test_a_turn_ends_with_a_real_reply(probe: Probe):
    setup = Setup(probe, Path(), "dev", 0, 0, [], [])
    long = "Certainly, I will look that up for you at once."
    tool = "{} " * 150
    talk = []
    for i in range(TURNS):
        talk += [message("user", f"Question {i}"), message("assistant", "OK"), message("tool", tool)]
        talk += [message("assistant", long)]
    item = make_item(setup, 7, "made", talk)
    assert item is not None and len(item.turns) == TURNS and item.number == 7
    decode_ = probe.tokenizer.decode
    assert SYSTEM in decode_(item.turns[0][0][: item.anchor]) and "Question" not in decode_(
        item.turns[0][0][: item.anchor]
    )
    assert all(decode_(reply).startswith(long) for _, reply in item.turns)
    assert all(
        "OK" in decode_(prompt) and f"Question {i}" in decode_(prompt) for i, (prompt, _) in enumerate(item.turns)
    )
    assert all(reply[-1] in end_tokens(probe) for _, reply in item.turns)
    assert make_item(setup, 7, "made", talk[4:]) is None


def test_enough_conversations_in_each_half(probe: Probe, data: Path):
    halves = [Turns().items(Setup(probe, data, half, 0, 0, [], [])) for half in HALVES]
    assert all(len(half) >= 12 for half in halves)
    assert not {i.number for i in halves[0]} & {i.number for i in halves[1]}


@pytest.mark.parametrize("pieces_", [1, 2, 4])
def test_pieces_end_with_the_same_slots(probe: Probe, ids: list[int], pieces_: int):
    base = ours("x")
    rows = [
        feed_in_pieces(probe.row(), ids[:130], InPieces("y", base.config, base="x", pieces=pieces_, again=again), 0.2)
        for again in (False, True)
    ]
    assert [row.slots for row in rows] == [26, 26] and [row.tokens for row in rows] == [130, 130]
    if pieces_ == 1:
        once = base.prefill(probe, ids[:130], 0.2)
        assert all(torch.equal(a.k, b.k) for row in rows for a, b in zip(row.layers, once.layers, strict=True))


def test_a_reply_compressed_while_it_grows(probe: Probe, ids: list[int]):
    prompt = probe.row(ids[:19])
    full = prompt.clone().feed(ids[19:90])
    row = ConversationRow(prompt.clone(), replace(ours("x", interval=32).config, budget=0.2), border=None)
    row.whole_prompt(ids[:20])
    log_probs = row.reply(ids[20:91])
    assert torch.equal(log_probs[:32], prompt.clone().feed(ids[19:51]))  # raw until the first compression
    assert (log_probs[:32] - full[:32]).abs().max() < 1e-4 < (log_probs[32:] - full[32:]).abs().max()
    assert row.row.slots == 19 + slots_of(0.2, 64) + 7 and row.row.tokens == 90
    assert row.held == [*range(20, 52), *range(19 + 7 + 1, 19 + 7 + 33), *range(19 + 13 + 1, 19 + 13 + 8)]
