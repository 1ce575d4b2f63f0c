"""Originals in the evaluator: what is read back, and that native ones lose nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.conversation_row import ConversationRow
from keepkv_sglang.tools.evaluate.methods import slots_of
from keepkv_sglang.tools.evaluate.originals import through
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.turn.anchor import MessageBorder

CONFIG = KeepKVConfig(enabled=True, budget=0.2, references=16)  # with the window, fewer than a long turn has tokens
BORDER = MessageBorder(2, 0)  # the demo model's <|im_end|>
ANCHOR = 20
PROMPTS = (120, 90, 30, 80)  # tokens; the first has the anchor; the third alone would be too short to be compressed


@pytest.fixture(scope="module")
def talk(ids: list[int]) -> list[int]:
    return [*ids[: ANCHOR - 1], BORDER.token, *ids[ANCHOR:]]


def turns(row: ConversationRow, talk: list[int], replies: int) -> list[torch.Tensor]:
    """Log-probabilities of each turn's reply of so many tokens."""
    made, at = [], 0
    for prompt in PROMPTS:
        row.prompt(talk[at : at + prompt])
        made.append(row.reply(talk[at + prompt : at + prompt + replies]))
        at += prompt + replies
    return made


def full_cache(probe: Probe, talk: list[int], replies: int) -> list[torch.Tensor]:
    row, made, at = probe.row(), [], 0
    for prompt in PROMPTS:
        row.feed(talk[row.tokens : at + prompt - 1], last=1)
        made.append(row.feed(talk[at + prompt - 1 : at + prompt + replies])[:-1])
        at += prompt + replies
    return made


def test_nothing_is_lost_with_native_originals(probe: Probe, talk: list[int]):
    """H4: replies of one token are expected by a read that nothing was merged in: the difference is float32 rounding.
    The row is compressed to its budget after every turn all the same."""
    row = ConversationRow(probe.row(), CONFIG, BORDER, "native")
    got = turns(row, talk, 1)
    for mine, full in zip(got, full_cache(probe, talk, 1), strict=True):
        assert mine.shape == full.shape and (mine - full).abs().max() < 1e-4
    end = sum(PROMPTS) + len(PROMPTS) - 2  # the last prompt token is the reply's
    # And the last prompt token before, which lies raw.
    assert row.state is not None and row.state.unpacked_tokens == row.spans[-2].tokens + 1
    assert row.slots_before_reply == ANCHOR + slots_of(CONFIG.budget, end - ANCHOR)
    assert [(span.first, span.is_prompt) for span in row.spans] == [(ANCHOR, True)] * len(PROMPTS)
    off = turns(ConversationRow(probe.row(), CONFIG, BORDER), talk, 1)
    assert (off[-1] - got[-1]).abs().max() > 0.1


def test_what_was_archived_is_what_was_computed(probe: Probe, talk: list[int]):
    """Unpacked rows are, bit for bit, the K/V of the full cache's tokens before their first compression; those of a
    reply are what was computed over the compressed row."""
    row = ConversationRow(probe.row(), CONFIG, BORDER, "native")
    row.prompt(talk[:120])
    read = probe.row(talk[:120])
    row.reply(talk[120:140])
    decoded = row.row.clone()
    row.prompt(talk[140:230])
    assert row.archive is not None and (row.archive.begin, row.archive.end) == (ANCHOR, 229)
    row.archive.unpack(row.row, row.row.tokens)
    assert row.row.slots == row.row.tokens == 230
    for layer, first, reply in zip(row.row.layers, read.layers, decoded.layers, strict=True):
        assert torch.equal(layer.k[:119], first.k[:119]) and torch.equal(layer.v[:119], first.v[:119])
        assert torch.equal(layer.k[119:139], reply.k[-20:]) and torch.equal(layer.v[119:139], reply.v[-20:])
        assert not layer.lv.any()


def test_a_long_reply_is_archived_as_it_is_compressed(probe: Probe, talk: list[int]):
    """At every interval, also with a window as long as one: its first query is the prompt's last token's."""
    for window in (8, 32):
        row = ConversationRow(probe.row(), replace(CONFIG, interval=32, window=window), BORDER, "native")
        row.prompt(talk[:100])
        assert row.reply(talk[100:200]).shape[0] == 100
        assert [span.end for span in row.spans] == [99, 99 + 32, 99 + 64, 99 + 96]
        assert row.archive is not None and row.archive.end == 99 + 96
        row.prompt(talk[200:230])
        assert row.spans[-1].first == ANCHOR and row.spans[-1].end == row.archive.end == 229


def test_a_budget_in_slots(probe: Probe, talk: list[int]):
    row = ConversationRow(probe.row(), replace(CONFIG, budget=40), BORDER, "native")
    for mine, full in zip(turns(row, talk, 1), full_cache(probe, talk, 1), strict=True):
        assert (mine - full).abs().max() < 1e-4
    assert row.slots_before_reply == ANCHOR + 40


def test_a_prompt_with_nothing_new_reads_the_row(probe: Probe, talk: list[int]):
    row = ConversationRow(probe.row(), CONFIG, BORDER, "native")
    row.prompt(talk[:120])
    slots = row.row.slots
    other = row.clone()
    other.prompt(talk[120:121])
    assert other.row.slots == slots + 1 and len(other.spans) == 1
    other = row.clone()
    other.prompt(talk[120:122])
    assert len(other.spans) == 2 and len(row.spans) == 1 and row.row.slots == slots


def test_codecs_are_close(probe: Probe, talk: list[int]):
    """int8 differs less than int4, and both less than a row that is read compressed."""
    full, most = full_cache(probe, talk, 1), {}
    for kept in ("off", "native", "int8", "int4"):
        got = turns(ConversationRow(probe.row(), CONFIG, BORDER, kept), talk, 1)
        most[kept] = max(float((f - mine).abs().max()) for f, mine in zip(full, got, strict=True))
    assert most["native"] < 1e-4 < most["int8"] < most["int4"] / 2 < most["off"] / 4, most


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_blocks_begin_where_the_archive_ended(codec: str):
    """70 tokens at once are blocks of 64 and 6: the same as archived apart, and not as cut elsewhere."""
    k, v = torch.randn(2, 70, 3, 64, generator=torch.Generator().manual_seed(0))
    whole = through(codec, k, v)
    parts = [through(codec, k[a:b], v[a:b]) for a, b in ((0, 64), (64, 70))]
    assert all(torch.equal(x, torch.cat(y)) for x, y in zip(whole, zip(*parts, strict=True), strict=True))
    assert all(
        0 < (x - y).norm() / y.norm() < {"int8": 0.02, "int4": 0.2}[codec] for x, y in zip(whole, (k, v), strict=True)
    )
