"""Task `instructions`: does an answer still follow every instruction of a compressed system prompt?

The system prompt is an IFEval prompt (arXiv 2311.07911) with two or three instructions that a program can check; a
longer text and a request follow. "The Pitfalls of KV Cache Compression" found that eviction drops some of several
instructions silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keepkv_sglang.tools.evaluate.conversation import message
from keepkv_sglang.tools.evaluate.documents import HALVES, lines
from keepkv_sglang.tools.evaluate.ifeval import followed, known
from keepkv_sglang.tools.evaluate.system_prompt import Item, SystemPromptTask, fillers, request
from keepkv_sglang.tools.evaluate.task import Setup

ITEMS = 50
INTRODUCTION = "You are a helpful assistant. Your only task is this, and every detail of it matters:\n\n"
ASK = "Now give your answer. Follow all the instructions you were given."
MOST_WORDS, MOST_SENTENCES = 80, 6  # an answer of reply_tokens tokens can hold that much


class Instructions(SystemPromptTask):
    """Share of a system prompt's two or three checkable instructions that the answer follows (IFEval, strict)."""

    name = "instructions"
    scored = "Instructions followed (%, mean over prompts)"

    def items(self, setup: Setup) -> Sequence[Item]:
        rows, _ = usable(lines(setup.data / "ifeval/input_data_first300.jsonl"))
        texts = fillers(setup)
        mine = rows[HALVES.index(setup.half) :: 2][: setup.items or ITEMS]
        return [
            Item(
                row["key"], (message("system", INTRODUCTION + row["prompt"]), request(texts[i % len(texts)], ASK)), row
            )
            for i, row in enumerate(mine)
        ]

    def score(self, item: Item, answer: str) -> float:
        checks = followed(answer, item.extra["instruction_id_list"], item.extra["kwargs"])
        return sum(checks) / len(checks)

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        note = (
            "Of IFEval's first 300 prompts those with two or more instructions are taken; left out are prompts whose"
            f" checks need a language detector, or more than {MOST_WORDS} words or {MOST_SENTENCES} sentences"
            f" (answers end after {self.reply_tokens} tokens). Greedy answers."
        )
        return note + "\n\n" + super().report(rows)


def usable(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """Prompts with several instructions that can be checked and fit an answer; how many were left out, by reason."""
    left_out = {"one instruction": 0, "no check": 0, "too long an answer": 0}
    chosen = []
    for row in rows:
        if len(row["instruction_id_list"]) < 2:
            left_out["one instruction"] += 1
        elif not known(row["instruction_id_list"]):
            left_out["no check"] += 1
        elif any(_long(given) for given in row["kwargs"]):
            left_out["too long an answer"] += 1
        else:
            chosen.append(row)
    return chosen, left_out


def _long(given: Mapping[str, Any]) -> bool:
    least = given.get("relation") == "at least"
    return least and ((given.get("num_words") or 0) > MOST_WORDS or (given.get("num_sentences") or 0) > MOST_SENTENCES)
