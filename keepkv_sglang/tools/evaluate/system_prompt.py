"""What the tasks about system prompts share: one chat, compressed with and without its system prompt protected.

Protected: the first message keeps one slot per token, as the server's anchor does, and the rest gets the budget.
Unprotected: everything is compressed together, into as many slots as the protected row holds, so that only where the
slots go differs. ("The Pitfalls of KV Cache Compression", arXiv 2510.00231, compares the same way.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.tools.evaluate import fidelity
from keepkv_sglang.tools.evaluate.conversation import Message, end_tokens, message, pieces
from keepkv_sglang.tools.evaluate.documents import documents
from keepkv_sglang.tools.evaluate.methods import DEFAULT, RELEASED, SNAPKV, Method, Ours, compress_tail, slots_of
from keepkv_sglang.tools.evaluate.probe import Probe, Row, agreement
from keepkv_sglang.tools.evaluate.results import grouped
from keepkv_sglang.tools.evaluate.task import Setup, ours_only
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import mean
from keepkv_sglang.turn.anchor import first_message_end, message_border

METHODS = (DEFAULT, SNAPKV, RELEASED)
FILLER_TOKENS = 256  # of real text between the system prompt and the request, at most
FILLER_SOURCES = ("swe_agent", "tau_airline", "tau_retail", "manual", "library")  # no requests to a model among them
VARIANTS = ("unprotected", "protected")


@dataclass(frozen=True)
class Item:
    """messages: the first is the system prompt; a reply to the last is asked for. extra: what `score` needs."""

    number: int
    messages: Sequence[Message]
    extra: Any = None


@dataclass(frozen=True)
class Prepared:
    """full: the prompt without its last token, which is the reply's first slot, as on the server; system: tokens of
    the first message; reply: what the full cache answers, log_probs [len(reply), vocabulary] of it; without: the
    score of an answer that never saw the system prompt."""

    item: Item
    last: int
    full: Row
    system: int
    reply: list[int]
    log_probs: torch.Tensor
    score: float
    without: float


class SystemPromptTask(ABC):
    """Base: a task gives items and the score of an answer in [0, 1]."""

    name = ""
    scored = ""
    reply_tokens = 128

    @abstractmethod
    def items(self, setup: Setup) -> Sequence[Item]:
        """As Task.items."""

    @abstractmethod
    def score(self, item: Item, answer: str) -> float:
        """Of one answer, in [0, 1]."""

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        return ours_only(setup, METHODS)

    def prepare(self, setup: Setup, item: Item) -> Prepared:
        probe = setup.probe
        ids = pieces(probe, [(item.messages, True)])[0]
        system = first_message_end(ids, message_border(probe.tokenizer))
        if not 0 < system < len(ids) - 1:
            raise ValueError(f"the chat template of {probe.path} has no system message: use another model")
        full = probe.row(ids[:-1])
        reply = self._generate(probe, full.clone(), ids[-1])
        log_probs = full.clone().feed([ids[-1], *reply[:-1]])
        bare = pieces(probe, [(item.messages[1:], True)])[0]
        without = self._generate(probe, probe.row(bare[:-1]), bare[-1])
        decode = probe.tokenizer.decode
        return Prepared(
            item, ids[-1], full, system, reply, log_probs,
            self.score(item, decode(reply)), self.score(item, decode(without)),
        )  # fmt: skip

    def measure(self, setup: Setup, prepared: Prepared, method: Method, budget: float) -> dict[str, Any]:
        """kl: to the full cache, along the full cache's own reply."""
        assert isinstance(method, Ours)
        probe, full, system = setup.probe, prepared.full, prepared.system
        m = slots_of(budget, full.tokens - system)
        values: dict[str, Any] = {"full": prepared.score, "without": prepared.without, "system_tokens": system}
        for variant in VARIANTS:
            row = full.clone()
            if variant == "protected":
                compress_tail(row, method.config, m, start=system, offline_scorer=method.offline_scorer)
            else:
                compress_tail(row, method.config, system + m, offline_scorer=method.offline_scorer)
            values["slots"] = row.slots
            fed = [prepared.last, *prepared.reply[:-1]]
            values[f"{variant}_kl"] = agreement(prepared.log_probs, row.clone().feed(fed), fed).kl
            answer = probe.tokenizer.decode(self._generate(probe, row, prepared.last))
            values[variant], values[f"{variant}_text"] = self.score(prepared.item, answer), answer
        return values

    def _generate(self, probe: Probe, row: Row, last: int) -> list[int]:
        """At least one token: an answer that ends at once is its end token."""
        ends = end_tokens(probe)
        return row.generate([last], self.reply_tokens, ends) or ends[:1]

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        first = list({row["item"]: row for row in rows}.values())
        full, without = (mean([100 * row[name] for row in first]).text(1) for name in ("full", "without"))
        head = (
            f"{self.scored} over {len(first)} prompts, system prompt of"
            f" {mean([row['system_tokens'] for row in first]).mean:.0f} tokens on average. Full cache: {full};"
            f" without the system prompt: {without}. Both variants hold the same number of slots."
        )
        columns = (
            "method", "budget", "slots", "unprotected %", "protected %", "protected - unprotected", "protected - full",
            "KL unprotected", "KL protected",
        )  # fmt: skip
        lines: list[Sequence[str]] = []
        for (budget, method), chosen in sorted(grouped(rows, "budget", "method").items()):
            gained = mean([100 * (row["protected"] - row["unprotected"]) for row in chosen])
            lost = mean([100 * (row["protected"] - row["full"]) for row in chosen])
            cells = [mean([100 * row[variant] for row in chosen]).text(1) for variant in VARIANTS]
            kl = [f"{mean([row[f'{variant}_kl'] for row in chosen]).mean:.3f}" for variant in VARIANTS]
            slots = f"{mean([row['slots'] for row in chosen]).mean:.0f}"
            lines.append((method, f"{budget:.0%}", slots, *cells, gained.text(1), lost.text(1), *kl))
        return f"{head}\n\n{tables.markdown(columns, lines)}"

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        curves: dict[str, dict[float, float]] = {}
        for (method, budget), chosen in sorted(grouped(rows, "method", "budget").items()):
            for variant in VARIANTS:
                points = curves.setdefault(f"{method}, {variant}", {})
                points[budget] = 100 * mean([row[variant] for row in chosen]).mean
        first = list({row["item"]: row for row in rows}.values())
        for name in ("full", "without"):
            curves[name] = dict.fromkeys(
                sorted({row["budget"] for row in rows}), 100 * mean([r[name] for r in first]).mean
            )
        return [plots.curves(curves, folder / f"{self.name}.png", "slots kept behind the system prompt",
                             f"{self.scored} (%)", log=False)]  # fmt: skip


def fillers(setup: Setup) -> list[str]:
    """Real texts of setup.half, those of task fidelity, cut to FILLER_TOKENS."""
    made = documents(setup.probe.ids, setup.data, fidelity.DOCUMENTS, setup.tokens, fidelity.FOLLOWING)
    tokens = min(FILLER_TOKENS, setup.tokens)
    chosen = [text.prompt[:tokens] for text in made if text.half == setup.half and text.source in FILLER_SOURCES]
    return [setup.probe.tokenizer.decode(ids) for ids in chosen]


def request(filler: str, ask: str) -> Message:
    """A user message: a text, then what is wanted."""
    return message("user", f"Here is a text that may be of use:\n\n{filler}\n\n{ask}")
