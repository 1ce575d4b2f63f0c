"""Task `turns`: a six-turn agent conversation, compressed once per turn as the server does, against the full cache.

Real dialogues of tau-bench (users, tools, an agent) behind a system prompt of ours, teacher-forced, in a row that turn/
compresses turn by turn with the server's own rules (conversation_row.py).

With originals a prompt is read over the originals of all before it, and everything behind the system prompt is
compressed again with it, once. Slots are the budget's share of these tokens, as without, where each turn rounds up on
its own and one below min_tokens waits. A reply's first token is expected before the compression then, as on a server,
and after it without: `first_top1` and `first_kl` are of that token alone, so that both can be compared but for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.conversation import Message, message, pieces
from keepkv_sglang.tools.evaluate.conversation_row import ConversationRow
from keepkv_sglang.tools.evaluate.documents import HALVES, lines
from keepkv_sglang.tools.evaluate.methods import DEFAULT, RELEASED, SNAPKV, Method, Ours, compress_tail
from keepkv_sglang.tools.evaluate.probe import Probe, Row, agreement
from keepkv_sglang.tools.evaluate.results import OFF, ORIGINALS, grouped, variants
from keepkv_sglang.tools.evaluate.task import Setup, ours_only
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import geometric_mean, mean, paired_ratio, weighted_mean
from keepkv_sglang.turn.anchor import first_message_end, message_border

ITEMS = 30
TURNS = 6
MOST_TOKENS = 5120  # a longer conversation is left out: its prefill costs too much
REPLY_TOKENS = 8  # shorter replies do not end a turn
# The first turn takes in exchanges until it has that many tokens: the server leaves shorter prompts whole (min_tokens),
# and a first turn that is not compressed at all is nothing to compare a sixth with.
FIRST_TOKENS = KeepKVConfig().min_tokens
METHODS = (DEFAULT, SNAPKV, RELEASED)
COLUMNS = ("kl", "top1", "slots", "tokens", "reply_tokens", "first_kl", "first_top1")  # of a result, one per turn
FILES = {
    "tau_airline": "tau_bench/MockAirlineDomainEnv-few_shot.jsonl",
    "tau_retail": "tau_bench/MockRetailDomainEnv-few_shot.jsonl",
}
SYSTEM = (
    "You are a customer service agent. You help users with their reservations, orders, refunds, exchanges and profiles."
    " Find out who the user is before you look anything up. Tools answer in JSON; tell the user only what the tools"
    " say, and ask for an explicit yes before you change anything. Hand over to a human agent when a request is"
    " outside your policy."
)


@dataclass(frozen=True)
class Item:
    """anchor: tokens of the system message. turns: (prompt, reply) token ids; the first prompt has the anchor."""

    number: int
    source: str
    anchor: int
    turns: tuple[tuple[list[int], list[int]], ...]


@dataclass(frozen=True)
class Prepared:
    """log_probs: per turn [len(reply), vocabulary], of each reply token's place. full: the full cache before the last
    reply."""

    item: Item
    log_probs: list[torch.Tensor]
    full: Row


class Turns:
    """Agreement with the full cache over the replies of a six-turn agent conversation, finished turns left alone."""

    name = "turns"
    reads_originals = True

    def items(self, setup: Setup) -> Sequence[Item]:
        made: list[Item] = []
        half = HALVES.index(setup.half)
        talks = [(source, talk) for source, path in FILES.items() for talk in lines(setup.data / path)]
        for number, (source, talk) in enumerate(talks):
            if number % 2 == half and len(made) < (setup.items or ITEMS):
                item = make_item(setup, number, source, messages_of(talk["messages_display"]))
                if item is not None:
                    made.append(item)
        return made

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        return ours_only(setup, METHODS)

    def prepare(self, setup: Setup, item: Item) -> Prepared:
        row, log_probs = setup.probe.row(), []
        for prompt, reply in item.turns:
            row.feed(prompt[:-1], last=1)
            full = row.clone()
            log_probs.append(row.feed([prompt[-1], *reply])[:-1])
        return Prepared(item, log_probs, full)

    def measure(self, setup: Setup, prepared: Prepared, method: Method, budget: float) -> dict[str, Any]:
        assert isinstance(method, Ours)
        config = replace(method.config, budget=budget)
        row = ConversationRow(setup.probe.row(), config, message_border(setup.probe.tokenizer), method.originals)
        values: dict[str, Any] = {"source": prepared.item.source, "anchor": prepared.item.anchor}
        columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for (prompt, reply), full in zip(prepared.item.turns, prepared.log_probs, strict=True):
            row.prompt(prompt)
            assert row.state is not None
            log_probs = row.reply(reply)
            got, first = (agreement(full[:n], log_probs[:n], [prompt[-1], *reply[: n - 1]]) for n in (len(reply), 1))
            values_of_turn = (
                got.kl, got.top1, row.slots_before_reply, row.state.reply_start, len(reply), first.kl, first.top1
            )  # fmt: skip
            for name, value in zip(COLUMNS, values_of_turn, strict=True):
                columns[name].append(value)
        assert row.state is not None
        anchor = row.state.anchor_len
        # How much of the last turn's error comes from compressing in turns: the same slots, chosen all at once.
        once = prepared.full.clone()
        compress_tail(once, method.config, row.slots_before_reply - anchor, start=anchor)
        fed = [prompt[-1], *reply[:-1]]
        got = agreement(full, once.feed(fed), fed)
        return values | columns | {"once_kl": got.kl, "once_top1": got.top1}

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        rows = variants(rows)
        parts = []
        for (budget, variant), chosen in sorted(grouped(rows, "budget", "variant").items()):
            parts.append(_table(chosen, f"{variant}, {budget:.0%}"))
        if any(row["originals"] != OFF for row in rows):
            parts.append(_against_off(rows))
        return "\n\n".join(parts)

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        curves: dict[str, dict[float, float]] = {
            f"{variant}, {budget:.0%}": {
                turn + 1: 100 * mean([row["top1"][turn] for row in chosen]).mean for turn in range(TURNS)
            }
            for (budget, variant), chosen in sorted(grouped(variants(rows), "budget", "variant").items())
        }
        return [
            plots.curves(curves, folder / "turns.png", "turn", "top-1 agreement with the full cache (%)", log=False)
        ]


def messages_of(text: str) -> list[Message]:
    """A tau-bench dialogue. Tool calls, which the file does not show ('assistant: None'), are left out."""
    parts = re.split(r"(?:^|\n)(user|assistant|tool): ", text)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [message(role, body.strip()) for role, body in pairs if body.strip() != "None"]


def make_item(setup: Setup, number: int, source: str, messages: Sequence[Message]) -> Item | None:
    """The first TURNS turns; None when there are fewer, or more than MOST_TOKENS tokens. A turn: everything up to an
    answer of the agent of at least REPLY_TOKENS tokens; the first has at least FIRST_TOKENS before that answer."""
    parts: list[tuple[Sequence[Message], bool]] = []
    waiting, asked = [message("system", SYSTEM)], 0
    for said in messages:
        tokens = len(setup.probe.ids(said["content"]))
        if said["role"] == "assistant" and tokens >= REPLY_TOKENS and (parts or asked >= FIRST_TOKENS):
            parts += [(waiting, True), ([said], False)]
            waiting = []
        else:
            waiting.append(said)
            asked += tokens
    if len(parts) < 2 * TURNS or any(not said for said, _ in parts[: 2 * TURNS]):
        return None
    cut = pieces(setup.probe, parts[: 2 * TURNS])
    return item_of(setup.probe, number, source, cut) if sum(map(len, cut)) <= MOST_TOKENS else None


def item_of(probe: Probe, number: int, source: str, cut: Sequence[list[int]]) -> Item:
    """cut: token pieces (conversation.pieces): what comes before a reply, the reply, and so on."""
    border = message_border(probe.tokenizer)
    turns: list[tuple[list[int], list[int]]] = []
    left: list[int] = []
    for prompt, reply in zip(cut[::2], cut[1::2], strict=True):
        # A model stops at the border; what the template puts behind it comes with the next prompt.
        end = len(reply) - reply[::-1].index(border.token) if border and border.token in reply else len(reply)
        turns.append((left + prompt, reply[:end]))
        left = reply[end:]
    return Item(number, source, first_message_end(cut[0], border), tuple(turns))


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Per turn; and the paired difference to turn 1 over conversations."""
    head = f"**{title}: {len(rows)} conversations, anchor of {mean([row['anchor'] for row in rows]).mean:.0f} tokens**"
    columns = "turn", "tokens", "slots", "top-1 % [95 %]", "minus turn 1, points", "KL gm [95 %]"
    turns: list[Sequence[object]] = []
    for turn in range(TURNS):
        top1 = [100 * row["top1"][turn] for row in rows]
        change = mean([100 * (row["top1"][turn] - row["top1"][0]) for row in rows])
        tokens, slots = (f"{mean([row[name][turn] for row in rows]).mean:.0f}" for name in ("tokens", "slots"))
        kl = geometric_mean([row["kl"][turn] for row in rows]).text(3)
        turns.append((turn + 1, tokens, slots, mean(top1).text(1), change.text(1) if turn else "-", kl))
    once = mean([100 * row["once_top1"] for row in rows])
    gained = mean([100 * (row["top1"][-1] - row["once_top1"]) for row in rows])
    end = (
        f"Turn {TURNS} with the same slots behind the anchor, compressed once from the full cache: top-1"
        f" {once.text(1)} %, KL gm {geometric_mean([row['once_kl'] for row in rows]).text(3)}; in turns minus once:"
        f" {gained.text(1)} points."
    )
    return f"{head}\n\n{tables.markdown(columns, turns, text=())}\n\n{end}"


def _against_off(rows: Sequence[Mapping[str, Any]]) -> str:
    """Turns 2 to the last, all tokens of their replies together: with originals, and minus without, over the
    conversations that both have."""
    columns = (
        "method", "budget", "originals", "conversations", f"slots, turn {TURNS}", "top-1 % [95 %]", "minus off, points",
        "KL / off", "minus off but for first tokens, points", "KL / off but for first tokens",
    )  # fmt: skip
    lines: list[Sequence[object]] = []
    for (method, budget), chosen in sorted(grouped(rows, "method", "budget").items()):
        by_kept = grouped(chosen, "originals")
        off = {row["item"]: row for row in by_kept.get((OFF,), [])}
        for kept in (kept for kept in ORIGINALS if (kept,) in by_kept):
            mine = by_kept[(kept,)]
            top1, weights = zip(*(_later(row, "top1") for row in mine), strict=True)
            cells = [f"{mean([row['slots'][-1] for row in mine]).mean:.0f}"]
            cells.append(weighted_mean([100 * x for x in top1], weights).text(1))
            pairs = [(row, off[row["item"]]) for row in mine if row["item"] in off]
            for first in (True, False) if kept != OFF else ():
                # Rows of before have no column of first tokens.
                both = [pair for pair in pairs if first or all("first_kl" in row for row in pair)]
                cells += _minus(both, first) if both else ["-", "-"]
            lines.append((method, f"{budget:.0%}", kept, len(mine), *cells, *["-"] * (6 - len(cells))))
    head = f"**Originals, turns 2 to {TURNS}; differences by conversation**"
    return f"{head}\n\n{tables.markdown(columns, lines, text=(0, 2))}"


def _minus(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], first: bool) -> list[str]:
    """Points of top-1 by token, and geometric mean ratio of KL, of (with, without)."""
    gained, weights = [], []
    for pair in pairs:
        (mine, tokens), (base, _) = (_later(row, "top1", first) for row in pair)
        gained.append(100 * (mine - base))
        weights.append(tokens)
    kl = [[_later(pair[side], "kl", first)[0] for pair in pairs] for side in (0, 1)]
    return [weighted_mean(gained, weights).text(1), paired_ratio(*kl).text()]


def _later(row: Mapping[str, Any], name: str, first: bool = True) -> tuple[float, float]:
    """(mean over reply tokens of turns 2 to the last, number of these). first: with each reply's first token."""
    total, count = 0.0, 0
    for turn in range(1, TURNS):
        total += row[name][turn] * row["reply_tokens"][turn]
        count += row["reply_tokens"][turn]
        if not first:
            total -= row[f"first_{name}"][turn]
            count -= 1
    return total / count, count
