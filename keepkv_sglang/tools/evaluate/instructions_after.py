"""Task `instructions_after`: are the instructions of an earlier turn followed once that turn was compressed?

Turn 1 gives an IFEval prompt (arXiv 2311.07911) with two or three instructions that a program can check, and a longer
text behind it; turn 2 asks for the answer. Both are the user's: nothing of them is the anchor. Compressed turn by turn
by the server's own rules (conversation_row.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.evaluate.conversation import end_tokens, message, pieces
from keepkv_sglang.tools.evaluate.conversation_row import ConversationRow
from keepkv_sglang.tools.evaluate.documents import HALVES, lines
from keepkv_sglang.tools.evaluate.ifeval import followed
from keepkv_sglang.tools.evaluate.instructions import ASK, ITEMS, usable
from keepkv_sglang.tools.evaluate.methods import DEFAULT, Method, Ours
from keepkv_sglang.tools.evaluate.results import OFF, ORIGINALS, grouped
from keepkv_sglang.tools.evaluate.system_prompt import fillers
from keepkv_sglang.tools.evaluate.task import Setup, ours_only
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.report.statistics import mean
from keepkv_sglang.turn.anchor import message_border

SYSTEM = "You are a helpful assistant."
TASK = "I have one task for you, and every detail of it matters. Do not answer yet.\n\n{task}\n\n"
TEXT = "Here is a text that may be of use:\n\n{text}"
READ = "I have read the task and the text. Tell me when you want the answer."
REPLY_TOKENS = 120  # fewer than an interval


@dataclass(frozen=True)
class Item:
    """row: IFEval's; first, reply, second: token ids of turn 1's prompt and reply and of turn 2's prompt."""

    number: int
    row: Mapping[str, Any]
    first: list[int]
    reply: list[int]
    second: list[int]


@dataclass(frozen=True)
class Prepared:
    """score: of the full cache's answer."""

    item: Item
    score: float


class InstructionsAfter:
    """Share of an earlier turn's two or three checkable instructions that the answer follows (IFEval, strict)."""

    name = "instructions_after"
    reads_originals = True

    def items(self, setup: Setup) -> Sequence[Item]:
        rows, _ = usable(lines(setup.data / "ifeval/input_data_first300.jsonl"))
        texts, made = fillers(setup), []
        for i, row in enumerate(rows[HALVES.index(setup.half) :: 2][: setup.items or ITEMS]):
            told = TASK.format(task=row["prompt"]) + TEXT.format(text=texts[i % len(texts)])
            parts = [([message("system", SYSTEM), message("user", told)], True)]
            parts += [([message("assistant", READ)], False), ([message("user", ASK)], True)]
            made.append(Item(row["key"], row, *pieces(setup.probe, parts)))
        return made

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        return ours_only(setup, (DEFAULT,))

    def prepare(self, setup: Setup, item: Item) -> Prepared:
        ids = item.first + item.reply + item.second
        row = setup.probe.row(ids[:-1])
        return Prepared(item, self._score(setup, item, row.generate(ids[-1:], REPLY_TOKENS, end_tokens(setup.probe))))

    def measure(self, setup: Setup, prepared: Prepared, method: Method, budget: float) -> dict[str, Any]:
        assert isinstance(method, Ours)
        item, config = prepared.item, replace(method.config, budget=budget)
        row = ConversationRow(setup.probe.row(), config, message_border(setup.probe.tokenizer), method.originals)
        row.prompt(item.first)
        row.reply(item.reply)
        row.prompt(item.second)
        slots = row.slots_before_reply
        made = row.generate(REPLY_TOKENS, end_tokens(setup.probe))
        return {"slots": slots, "full": prepared.score, "followed": self._score(setup, item, made)}

    def _score(self, setup: Setup, item: Item, made: Sequence[int]) -> float:
        answer = setup.probe.tokenizer.decode(made)
        checks = followed(answer, item.row["instruction_id_list"], item.row["kwargs"])
        return sum(checks) / len(checks)

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        first = list({row["item"]: row for row in rows}.values())
        head = f"Full cache: {mean([100 * row['full'] for row in first]).text(1)} % over {len(first)} prompts."
        columns = (
            "method", "budget", "originals", "prompts", "slots before the answer", "followed % [95 %]",
            "minus full, points", "minus off, points",
        )  # fmt: skip
        lines: list[Sequence[object]] = []
        for (method, budget), chosen in sorted(grouped(rows, "method", "budget").items()):
            by_kept = grouped(chosen, "originals")
            off = {row["item"]: row["followed"] for row in by_kept.get((OFF,), [])}
            for kept in (kept for kept in ORIGINALS if (kept,) in by_kept):
                mine = by_kept[(kept,)]
                share = mean([100 * row["followed"] for row in mine])
                lost = mean([100 * (row["followed"] - row["full"]) for row in mine])
                gained = [100 * (row["followed"] - off[row["item"]]) for row in mine if row["item"] in off]
                cells = [share.text(1), lost.text(1), mean(gained).text(1) if gained and kept != OFF else "-"]
                slots = f"{mean([row['slots'] for row in mine]).mean:.0f}"
                lines.append((method, f"{budget:.0%}", kept, len(mine), slots, *cells))
        return f"{head}\n\n{tables.markdown(columns, lines, text=(0, 2))}"

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        return []
