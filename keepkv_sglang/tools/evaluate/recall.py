"""Tasks `recall*` and `needle*`: is a word that stands once in the prompt still found after compression?

Facts of our own ("The password of Alice is 'walnut'.") stand at even distances in real text of documents.py: several,
of which one is asked for (recall), or one alone (needle). The question is part of what is compressed, as when a server
compresses a prompt (recall, needle), or comes afterwards, as in the next turn of a chat (recall_after, needle_after).
The form follows the pass-key and needle tests of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.evaluate import fidelity
from keepkv_sglang.tools.evaluate.documents import HALVES, documents
from keepkv_sglang.tools.evaluate.methods import Full, Method
from keepkv_sglang.tools.evaluate.probe import Probe, Row
from keepkv_sglang.tools.evaluate.results import grouped
from keepkv_sglang.tools.evaluate.task import Setup
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import mean

ITEMS = 100
TOKENS = 1024  # at most: the texts around the facts are cut there
FULL = Full()
ANSWER_TOKENS = 8
NEEDLE_SOURCES = ("ruler",)  # texts that are made of facts themselves
NAMES = (
    "Alice", "Boris", "Clara", "Derek", "Elena", "Frank", "Grace", "Henry", "Irene", "Jacob", "Karen", "Lucas",
    "Maria", "Nolan", "Olivia", "Peter", "Rachel", "Simon", "Teresa", "Victor",
)  # fmt: skip
WORDS = (
    "walnut", "harbor", "copper", "velvet", "lantern", "meadow", "pepper", "saddle", "thunder", "window", "garden",
    "bottle", "castle", "dragon", "engine", "feather", "guitar", "hammer", "island", "jacket", "kitten", "ladder",
    "magnet", "needle", "orange", "pencil", "rabbit", "silver", "ticket", "violin", "anchor", "basket", "candle",
    "desert", "eagle", "forest", "glove", "honey", "ivory", "jungle", "kettle", "lemon", "mirror", "ocean",
    "pirate", "quartz", "river", "shadow", "tiger", "valley",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """prompt: text with its facts, without a question. facts: (name, word), in the order of the text. asked: names."""

    number: int
    source: str
    prompt: list[int]
    facts: tuple[tuple[str, str], ...]
    asked: str


@dataclass(frozen=True)
class Prepared:
    """ids: what is compressed; full: the same, prefilled."""

    item: Item
    ids: list[int]
    full: Row


class Recall:
    """Exact match of one of three passwords; the question is compressed with the text."""

    name = "recall"
    facts = 3
    question_seen = True

    def items(self, setup: Setup) -> Sequence[Item]:
        return make_items(setup, self.facts, setup.items or ITEMS)

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        """The full cache once, then all methods."""
        full: list[tuple[Method, float]] = [(FULL, 1.0)]
        return full + [(method, budget) for budget in setup.budgets for method in setup.methods]

    def prepare(self, setup: Setup, item: Item) -> Prepared:
        ids = item.prompt + (setup.probe.ids(question(item.asked)) if self.question_seen else [])
        return Prepared(item, ids, setup.probe.row(ids))

    def measure(self, setup: Setup, prepared: Prepared, method: Method, budget: float) -> dict[str, Any]:
        """hits of `asked` questions. With the question in the prompt one is asked; else every one of it."""
        probe, item = setup.probe, prepared.item
        row = method.prefill(probe, prepared.ids, budget, prepared.full)
        slots = row.slots
        words = dict(item.facts)
        if self.question_seen:
            answers = {item.asked: answer(probe, row, opening())}
        else:
            answers = {name: answer(probe, row.clone(), question(name) + opening()) for name in words}
        hits = sum(found == words[name] for name, found in answers.items())
        return {
            "source": item.source,
            "slots": slots,
            "asked": len(answers),
            "hits": hits,
            "answer": answers[item.asked],
        }

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        of_full = [row for row in rows if row["method"] == FULL.name]
        asked = sum(row["asked"] for row in of_full)
        head = f"Full cache: {_rate(of_full)} % of {asked} questions in {len(of_full)} prompts."
        columns = "method", "budget", "prompts", "questions", "correct % [95 %]", "of those the full cache answers, %"
        lines: list[Sequence[object]] = []
        known = {row["item"] for row in of_full if row["hits"] == row["asked"]}
        for (budget,), chosen in grouped([row for row in rows if row["method"] != FULL.name], "budget").items():
            by_method = grouped(chosen, "method")
            for (method,), mine in sorted(by_method.items(), key=lambda pair: -sum(row["hits"] for row in pair[1])):
                solvable = [row for row in mine if row["item"] in known]
                asked = sum(row["asked"] for row in mine)
                lines.append((method, f"{budget:.0%}", len(mine), asked, _rate(mine), _rate(solvable)))
        return f"{head}\n\n{tables.markdown(columns, lines)}"

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        curves: dict[str, dict[float, float]] = {}
        for (method, budget), chosen in sorted(grouped(rows, "method", "budget").items()):
            if method != FULL.name:
                curves.setdefault(method, {})[budget] = 100 * mean([_share(row) for row in chosen]).mean
        return [plots.curves(curves, folder / f"{self.name}.png", "slots kept", "correct (%)", log=False)]


class RecallAfter(Recall):
    """Exact match of three passwords, each asked for only after the text was compressed without any question."""

    name = "recall_after"
    question_seen = False


class Needle(Recall):
    """Exact match of the only password in the text; the question is compressed with the text."""

    name = "needle"
    facts = 1


class NeedleAfter(Needle):
    """Exact match of the only password in the text, asked for only after the text was compressed."""

    name = "needle_after"
    question_seen = False


def make_items(setup: Setup, facts: int, count: int) -> list[Item]:
    """`count` items of setup.half. The texts are those of task fidelity's half, each several times with other facts;
    words and names of the two halves differ as well."""
    # The same call as fidelity's, so that a text is in the same half there and here.
    texts = documents(setup.probe.ids, setup.data, fidelity.DOCUMENTS, setup.tokens, fidelity.FOLLOWING)
    texts = [text for text in texts if text.half == setup.half and text.source not in NEEDLE_SOURCES]
    half = HALVES.index(setup.half)
    made = []
    for index in range(count):
        text, number = texts[index % len(texts)], 2 * index + half
        rng = random.Random(1000 * facts + number)
        names, words = rng.sample(NAMES[half::2], facts), rng.sample(WORDS[half::2], facts)
        chosen = tuple(zip(names, words, strict=True))
        prompt = plant(setup.probe, text.prompt, chosen, min(setup.tokens, TOKENS), rng)
        made.append(Item(number, text.source, prompt, chosen, rng.choice(names)))
    return made


def plant(
    probe: Probe, text: Sequence[int], facts: Sequence[tuple[str, str]], tokens: int, rng: random.Random
) -> list[int]:
    """`tokens` tokens: `text` with one sentence per fact. The text is divided evenly among the facts; each stands
    between two lines or sentences at a random place of its part."""
    sentences = [probe.ids(f" The password of {name} is '{word}'. ") for name, word in facts]
    room = tokens - sum(map(len, sentences))
    if room < 16 * len(facts):
        raise ValueError(f"{tokens} tokens are too few for {len(facts)} facts: use a larger --tokens")
    ends = [0] + [i + 1 for i in range(room) if re.search(r"[.\n]\s*$", probe.tokenizer.decode([text[i]]))]
    made, at = [], 0
    for index, sentence in enumerate(sentences):
        low, high = index * room // len(facts), (index + 1) * room // len(facts)
        places = [end for end in ends if low <= end < high] or [(low + high) // 2]
        place = rng.choice(places)
        made += [*text[at:place], *sentence]
        at = place
    return made + list(text[at:room])


def question(name: str) -> str:
    """Comes behind the text; part of the prompt when the question is seen. A sentence to complete: the demo model
    answers twice as many of these as of "Question: ... Answer: ..."."""
    return f"\n\nAs the text above says, the password of {name}"


def opening() -> str:
    """How the answer begins. Never compressed: were it, the full cache would choose the answer's first token."""
    return " is '"


def answer(probe: Probe, row: Row, opening_text: str) -> str:
    """The word that the model writes behind the opening, greedy. The row grows."""
    made = row.generate(probe.ids(opening_text), ANSWER_TOKENS)
    return probe.tokenizer.decode(made).split("'")[0].strip().lower()


def _share(row: Mapping[str, Any]) -> float:
    return row["hits"] / row["asked"]


def _rate(rows: Sequence[Mapping[str, Any]]) -> str:
    """Per cent correct and its interval over prompts."""
    return mean([100 * _share(row) for row in rows]).text(1) if rows else "-"
