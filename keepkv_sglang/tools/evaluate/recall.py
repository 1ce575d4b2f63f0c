"""Tasks `recall*` and `needle*`: is a word that stands once in the prompt still found after compression?

Facts of our own ("The password of Alice is 'walnut'.") stand at even distances in real text of documents.py: several,
of which one is asked for (recall), or one alone (needle). The question is part of what is compressed, as when a server
compresses a prompt (recall, needle), or comes afterwards, as in the next turn of a chat (recall_after, needle_after).
The form follows the pass-key and needle tests of RULER (arXiv 2404.06654).

With originals (the *_after tasks) the text is one turn and the question the next, by the server's own rules
(conversation_row.py): the question is read over the text's originals, text and question are compressed together with
the question's queries, and the answer is decoded over that; its first token was expected before, as on a server.
Without, the question is read over the compressed text and stays raw, as a server leaves so short a turn. The budget is
the same; with originals it covers the question too, so the answer begins with fewer slots (`answer_slots`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.evaluate import fidelity
from keepkv_sglang.tools.evaluate.conversation_row import ConversationRow
from keepkv_sglang.tools.evaluate.documents import HALVES, documents
from keepkv_sglang.tools.evaluate.methods import Full, Method, Ours
from keepkv_sglang.tools.evaluate.probe import Probe, Row
from keepkv_sglang.tools.evaluate.results import OFF, ORIGINALS, grouped, variants
from keepkv_sglang.tools.evaluate.task import Setup
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import mean, weighted_mean

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
    reads_originals = False

    def question(self, name: str) -> str:
        """What is asked of one fact, without its opening."""
        return question(name)

    def opening(self) -> str:
        """How the answer begins."""
        return opening()

    def answer_tokens(self) -> int:
        """Most tokens of an answer."""
        return ANSWER_TOKENS

    def answer(self, probe: Probe, made: Sequence[int]) -> str:
        """What the tokens behind the opening say."""
        return _word(probe, made)

    def items(self, setup: Setup) -> Sequence[Item]:
        return make_items(setup, self.facts, setup.items or ITEMS)

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        """The full cache once, then all methods."""
        full: list[tuple[Method, float]] = [(FULL, 1.0)]
        return full + [(method, budget) for budget in setup.budgets for method in setup.methods]

    def prepare(self, setup: Setup, item: Item) -> Prepared:
        ids = item.prompt + (setup.probe.ids(self.question(item.asked)) if self.question_seen else [])
        return Prepared(item, ids, setup.probe.row(ids))

    def measure(self, setup: Setup, prepared: Prepared, method: Method, budget: float) -> dict[str, Any]:
        """hits of `asked` questions. With the question in the prompt one is asked; else every one of it."""
        probe, item = setup.probe, prepared.item
        words = dict(item.facts)
        opening, count = self.opening(), self.answer_tokens()
        endings = (
            {item.asked: opening} if self.question_seen else {name: self.question(name) + opening for name in words}
        )
        if isinstance(method, Ours) and method.originals != OFF:
            slots, answer_slots, made = answers_over_originals(probe, prepared, method, budget, endings, count)
        else:
            row = method.prefill(probe, prepared.ids, budget, prepared.full)
            slots, answer_slots = row.held, row.held + len(probe.ids(endings[item.asked]))
            made = {name: row.clone().generate(probe.ids(ending), count) for name, ending in endings.items()}
        answers = {name: self.answer(probe, tokens) for name, tokens in made.items()}
        right = [answers[name] == word for name, word in item.facts if name in answers]
        return {
            "source": item.source,
            "slots": slots,
            "answer_slots": answer_slots,
            "asked": len(answers),
            "hits": sum(right),
            "right": right,
            "answer": answers[item.asked],
        }

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        rows = variants(rows)
        of_full = [row for row in rows if row["method"] == FULL.name]
        asked = sum(row["asked"] for row in of_full)
        head = f"Full cache: {_rate(of_full)} % of {asked} questions in {len(of_full)} prompts."
        columns = "method", "budget", "prompts", "questions", "correct % [95 %]", "of those the full cache answers, %"
        lines: list[Sequence[object]] = []
        known = {row["item"] for row in of_full if row["hits"] == row["asked"]}
        for (budget,), chosen in grouped([row for row in rows if row["method"] != FULL.name], "budget").items():
            by_method = grouped(chosen, "variant")
            for (variant,), mine in sorted(by_method.items(), key=lambda pair: -sum(row["hits"] for row in pair[1])):
                solvable = [row for row in mine if row["item"] in known]
                asked = sum(row["asked"] for row in mine)
                lines.append((variant, f"{budget:.0%}", len(mine), asked, _rate(mine), _rate(solvable)))
        parts = [head, tables.markdown(columns, lines)]
        if any(row["originals"] != OFF for row in rows):
            parts.append(_against_off(rows))
        return "\n\n".join(parts)

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        curves: dict[str, dict[float, float]] = {}
        for (variant, budget), chosen in sorted(grouped(variants(rows), "variant", "budget").items()):
            if variant != FULL.name:
                curves.setdefault(variant, {})[budget] = 100 * mean([_share(row) for row in chosen]).mean
        return [plots.curves(curves, folder / f"{self.name}.png", "slots kept", "correct (%)", log=False)]


class RecallAfter(Recall):
    """Exact match of three passwords, each asked for only after the text was compressed without any question."""

    name = "recall_after"
    question_seen = False
    reads_originals = True


class Needle(Recall):
    """Exact match of the only password in the text; the question is compressed with the text."""

    name = "needle"
    facts = 1


class NeedleAfter(Needle):
    """Exact match of the only password in the text, asked for only after the text was compressed."""

    name = "needle_after"
    question_seen = False
    reads_originals = True


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
    return _word(probe, row.generate(probe.ids(opening_text), ANSWER_TOKENS))


def answers_over_originals(
    probe: Probe, prepared: Prepared, method: Ours, budget: float, endings: Mapping[str, str], count: int
) -> tuple[int, int, dict[str, list[int]]]:
    """Slots of the compressed text; slots before the answer to the item's own question; all answers, `count` tokens
    each. endings: by name, what is asked in a turn of its own behind the text."""
    config = replace(method.config, budget=budget)
    text = ConversationRow(prepared.full.clone(), config, border=None, originals=method.originals)
    text.read_prompt(prepared.ids)
    answers: dict[str, list[int]] = {}
    slots = {}
    for name, ending in endings.items():
        row = text.clone()
        row.prompt(probe.ids(ending))
        slots[name] = row.row.slots
        answers[name] = row.generate(count)
    return text.row.slots, slots[prepared.item.asked], answers


def _word(probe: Probe, made: Sequence[int]) -> str:
    return probe.tokenizer.decode(made).split("'")[0].strip().lower()


def _share(row: Mapping[str, Any]) -> float:
    return row["hits"] / row["asked"]


def _rate(rows: Sequence[Mapping[str, Any]]) -> str:
    """Per cent correct and its interval over prompts."""
    return mean([100 * _share(row) for row in rows]).text(1) if rows else "-"


def _against_off(rows: Sequence[Mapping[str, Any]]) -> str:
    """With originals, and minus without, over the prompts that both have."""
    full = {row["item"]: row for row in rows if row["method"] == FULL.name}
    columns = (
        "method", "budget", "originals", "prompts", "slots before the answer", "hits", "correct % [95 %]",
        "of the full cache's hits, %", "minus off, points",
    )  # fmt: skip
    lines: list[Sequence[object]] = []
    chosen_rows = [row for row in rows if row["method"] != FULL.name]
    for (method, budget), chosen in sorted(grouped(chosen_rows, "method", "budget").items()):
        by_kept = grouped(chosen, "originals")
        off = {row["item"]: row for row in by_kept.get((OFF,), [])}
        for kept in (kept for kept in ORIGINALS if (kept,) in by_kept):
            mine = by_kept[(kept,)]
            slots = [row["answer_slots"] for row in mine if "answer_slots" in row]  # not in older rows
            gained = [100 * (_share(row) - _share(off[row["item"]])) for row in mine if row["item"] in off]
            lines.append(
                (method, f"{budget:.0%}", kept, len(mine), f"{mean(slots).mean:.0f}" if slots else "-",
                 f"{sum(row['hits'] for row in mine)} of {sum(row['asked'] for row in mine)}", _rate(mine),
                 _of_full(mine, full),
                 mean(gained).text(1) if gained and kept != OFF else "-")
            )  # fmt: skip
    return f"**Originals; differences by prompt**\n\n{tables.markdown(columns, lines, text=(0, 2))}"


def _of_full(rows: Sequence[Mapping[str, Any]], full: Mapping[int, Mapping[str, Any]]) -> str:
    """Per cent of the questions that the full cache answers, all prompts together. full: its rows by item."""
    shares, known = [], []
    for row in rows:
        right, sure = row.get("right", ()), full.get(row["item"], {}).get("right", ())  # older rows have none
        if right and any(sure):
            known.append(sum(sure))
            shares.append(100 * sum(r and s for r, s in zip(right, sure, strict=True)) / known[-1])
    return weighted_mean(shares, known).text(1) if known else "-"
