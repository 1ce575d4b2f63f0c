"""Task `long`: contexts of 4,096 to 30,000 tokens: KL, a password asked for at the end, seconds and memory of the
compression, and how these grow.

A context is pieces of all sources of documents.py in random order, with one password (recall.py) in it and the question
at its end. Behind it the answer and the text that goes on are teacher-forced.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.tools.evaluate import recall
from keepkv_sglang.tools.evaluate.documents import HALVES, SOURCES
from keepkv_sglang.tools.evaluate.methods import DEFAULT, SNAPKV, Method
from keepkv_sglang.tools.evaluate.probe import Row, agreement
from keepkv_sglang.tools.evaluate.results import grouped
from keepkv_sglang.tools.evaluate.task import Setup, ours_only
from keepkv_sglang.tools.peak_memory import peak_memory
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import geometric_mean, mean

LENGTHS = (4096, 8192, 16384, 30_000)
DOCUMENTS = 3  # of each length
FOLLOWING = 128
PIECE = 6_000  # characters
METHODS = (DEFAULT, SNAPKV)
FOUND = ("found", "full")


@dataclass(frozen=True)
class Item:
    """prompt: tokens, the question last; following: the answer and what goes on; word: what the question asks for."""

    number: int
    length: int
    prompt: list[int]
    following: list[int]
    word: str


@dataclass(frozen=True)
class Prepared:
    """The full cache behind the prompt, what it says of `following`, and whether it finds the word."""

    item: Item
    full: Row
    log_probs: torch.Tensor
    found: bool


class Long:
    """KL, recall, seconds and memory of a compression, from 4,096 tokens up."""

    name = "long"

    def items(self, setup: Setup) -> Sequence[Item]:
        most = setup.probe.model.config.max_position_embeddings - 2 * FOLLOWING
        lengths = [length for length in LENGTHS if length <= most]
        if not lengths:
            raise ValueError(f"task {self.name} needs a model with more than {LENGTHS[0] + 2 * FOLLOWING} positions")
        ids, half = _mixed(setup), HALVES.index(setup.half)
        made, at = [], 0
        for length in lengths:
            for index in range(setup.items or DOCUMENTS):
                number = 1000 * length + 2 * index + half
                rng = random.Random(number)
                name, word = rng.choice(recall.NAMES[half::2]), rng.choice(recall.WORDS[half::2])
                question = setup.probe.ids(recall.question(name))
                text, rest = ids[at : at + length], ids[at + length : at + length + FOLLOWING]
                at += length + FOLLOWING
                if len(rest) < FOLLOWING:
                    raise ValueError(f"not enough text for so many documents of {length} tokens: use fewer --items")
                prompt = recall.plant(setup.probe, text, [(name, word)], length - len(question), rng) + question
                following = setup.probe.ids(f"{recall.opening()}{word}'.\n\n") + rest
                made.append(Item(number, length, prompt, following[:FOLLOWING], word))
        return made

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        return ours_only(setup, METHODS)

    def prepare(self, setup: Setup, item: Item) -> Prepared:
        full = setup.probe.row(item.prompt)
        log_probs = full.clone().feed(item.following)
        return Prepared(item, full, log_probs, _finds(setup, full.clone(), item))

    def measure(self, setup: Setup, prepared: Prepared, method: Method, budget: float) -> dict[str, Any]:
        """megabytes: the most that the process held during the compression, beyond what it held before."""
        item = prepared.item
        with peak_memory() as peak:
            began = time.perf_counter()
            row = method.prefill(setup.probe, item.prompt, budget, prepared.full)
            seconds = time.perf_counter() - began
        got = agreement(prepared.log_probs, row.clone().feed(item.following), item.following)
        return {
            "length": item.length, "slots": row.held, "kl": got.kl, "top1": got.top1, "full": prepared.found,
            "found": _finds(setup, row, item), "seconds": round(seconds, 3), "megabytes": round(peak.bytes / 1e6, 1),
        }  # fmt: skip

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        columns = (
            "method", "budget", "tokens", "documents", "slots", "KL gm [95 %]", "top-1 %", "password found",
            "with the full cache", "seconds", "grows as n^", "MB", "grows as n^",
        )  # fmt: skip
        lines: list[Sequence[object]] = []
        for (method, budget), chosen in sorted(grouped(rows, "method", "budget").items()):
            before: tuple[float, float, float] | None = None
            for (length,), mine in sorted(grouped(chosen, "length").items()):
                seconds, megabytes = (mean([r[name] for r in mine]).mean for name in ("seconds", "megabytes"))
                powers = ["-", "-"]
                if before is not None:
                    step = math.log(length / before[0])
                    powers = [_power(seconds, before[1], step), _power(megabytes, before[2], step)]
                before = length, seconds, megabytes
                kl, found = geometric_mean([r["kl"] for r in mine]), [sum(r[name] for r in mine) for name in FOUND]
                slots, top1 = (mean([r[name] for r in mine]).mean for name in ("slots", "top1"))
                lines.append(
                    (method, f"{budget:.0%}", length, len(mine), f"{slots:.0f}", kl.text(3), f"{100 * top1:.1f}",
                     *(f"{count} of {len(mine)}" for count in found), f"{seconds:.2f}", powers[0], f"{megabytes:.0f}",
                     powers[1])
                )  # fmt: skip
        return tables.markdown(columns, lines)

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        curves: dict[str, dict[float, float]] = {}
        for (method, budget, length), chosen in sorted(grouped(rows, "method", "budget", "length").items()):
            points = curves.setdefault(f"{method}, {budget:.0%}", {})
            points[length] = geometric_mean([r["kl"] for r in chosen]).mean
        return [plots.curves(curves, folder / "long.png", "context (tokens)", "KL to the full cache (nats, gm)")]


def _mixed(setup: Setup) -> list[int]:
    """Tokens of all sources in pieces, shuffled; every other piece of a source belongs to the half."""
    half, pieces = HALVES.index(setup.half), []
    for source in SOURCES.values():
        text = "\n\n".join(first for first, _ in source(setup.data))
        cut = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        pieces += list(dict.fromkeys(cut))[half::2][:40]  # tool documents come again and again
    random.Random(5).shuffle(pieces)
    return setup.probe.ids("\n\n".join(pieces))


def _finds(setup: Setup, row: Row, item: Item) -> bool:
    return recall.answer(setup.probe, row, recall.opening()) == item.word


def _power(now: float, before: float, step: float) -> str:
    return f"{math.log(now / before) / step:.2f}" if now > 0 and before > 0 else "-"
