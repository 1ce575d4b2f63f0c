"""Task `ruler_after`: RULER's hardest needles at 4k (arXiv 2404.06654, niah_multikey_3), asked for in a later turn.

Keys and values are UUIDs, every line of the text holds one pair, and all look alike: nothing tells a compression which
of them will be asked for. The text is cut to whole lines of at most TOKENS tokens, as many as fit a small model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from keepkv_sglang.tools.evaluate.documents import HALVES, lines
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.recall import ITEMS, TOKENS, Item, RecallAfter
from keepkv_sglang.tools.evaluate.task import Setup

FILE = "ruler/4096_niah_multikey_3_first200.jsonl"
BEFORE_KEY, BEFORE_VALUE = "One of the special magic uuids for ", " is: "
ANSWER_TOKENS = 48  # a UUID takes 25 to 36


class RulerAfter(RecallAfter):
    """Exact match of three of RULER's UUIDs, each asked for only after the text was compressed without any question."""

    name = "ruler_after"

    def question(self, name: str) -> str:
        return f"\n\nThe special magic uuid for {name} mentioned in the provided text"

    def opening(self) -> str:
        return " is:"

    def answer_tokens(self) -> int:
        return ANSWER_TOKENS

    def answer(self, probe: Probe, made: Sequence[int]) -> str:
        return probe.tokenizer.decode(made).strip().split(".")[0].split("\n")[0].strip()

    def items(self, setup: Setup) -> Sequence[Item]:
        half = HALVES.index(setup.half)
        rows = lines(setup.data / FILE)[half::2][: setup.items or ITEMS]
        return [self._item(setup, 2 * index + half, row["input"]) for index, row in enumerate(rows)]

    def _item(self, setup: Setup, number: int, text: str) -> Item:
        kept, size = [], 0
        for line in text.splitlines(keepends=True):
            ids = setup.probe.ids(line)
            if size + len(ids) > min(setup.tokens, TOKENS):
                break
            kept.append((line, ids))
            size += len(ids)
        pairs = [line.strip().rstrip(".").removeprefix(BEFORE_KEY).split(BEFORE_VALUE) for line, _ in kept]
        facts = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
        if len(facts) < self.facts:
            raise ValueError(f"{setup.tokens} tokens hold {len(facts)} of RULER's lines: use a larger --tokens")
        rng = random.Random(number)
        chosen = sorted(rng.sample(range(len(facts)), self.facts))
        asked = tuple(facts[i] for i in chosen)
        return Item(number, "ruler", [i for _, ids in kept for i in ids], asked, rng.choice(asked)[0])
