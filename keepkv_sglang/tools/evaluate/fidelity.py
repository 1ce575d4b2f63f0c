"""Task `fidelity`: one compression after prefill, then teacher-forced text: KL to the full cache, top-1, perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.tools.evaluate.documents import SOURCES, Document, documents
from keepkv_sglang.tools.evaluate.methods import RELEASED, SNAPKV, Method
from keepkv_sglang.tools.evaluate.probe import Row, agreement
from keepkv_sglang.tools.evaluate.results import grouped
from keepkv_sglang.tools.evaluate.task import Setup
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import geometric_mean, mean, paired_ratio, percentile

FOLLOWING = 128
DOCUMENTS = 40
BASES = {"SnapKV": SNAPKV, "released": RELEASED}


@dataclass(frozen=True)
class Prepared:
    """full: the document's prompt, uncompressed; log_probs [FOLLOWING, vocabulary] behind it, nll of the text there."""

    document: Document
    full: Row
    log_probs: torch.Tensor
    nll: float


def half_of(setup: Setup) -> list[Document]:
    """setup.items documents of setup.half, all of DOCUMENTS' by default; the same text has the same number in all."""
    wanted = setup.items or DOCUMENTS // 2
    rounds = -(-wanted // len(SOURCES))  # every other round of the sources is of this half
    made = documents(setup.probe.ids, setup.data, 2 * rounds * len(SOURCES), setup.tokens, FOLLOWING)
    return [document for document in made if document.half == setup.half][:wanted]


class Fidelity:
    """KL(full || compressed) over 128 teacher-forced tokens behind a compressed prompt."""

    name = "fidelity"

    def items(self, setup: Setup) -> Sequence[Document]:
        return half_of(setup)

    def prepare(self, setup: Setup, item: Document) -> Prepared:
        full = setup.probe.row(item.prompt)
        log_probs = full.clone().feed(item.following)
        return Prepared(item, full, log_probs, agreement(log_probs, log_probs, item.following).nll)

    def measure(self, setup: Setup, prepared: Prepared, method: Method, budget: float) -> dict[str, Any]:
        began = time.perf_counter()
        row = method.prefill(setup.probe, prepared.document.prompt, budget, prepared.full)
        seconds, slots = time.perf_counter() - began, row.held
        got = agreement(prepared.log_probs, row.feed(prepared.document.following), prepared.document.following)
        return {
            "source": prepared.document.source,
            "slots": slots,
            "kl": got.kl,
            "top1": got.top1,
            "perplexity_ratio": math.exp(got.nll - prepared.nll),
            "seconds": round(seconds, 3),
        }

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        parts = []
        for (budget,), chosen in grouped(rows, "budget").items():
            parts.append(_table(chosen, budget))
        parts.append(_by_source(rows))
        return "\n\n".join(part for part in parts if part)

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        curves: dict[str, dict[float, float]] = {}
        for (method, budget), chosen in grouped(rows, "method", "budget").items():
            curves.setdefault(method, {})[budget] = geometric_mean([r["kl"] for r in chosen]).mean
        values = {
            m: [r["kl"] for r in chosen] for (m, b), chosen in grouped(rows, "method", "budget").items() if b == 0.1
        }
        made = [plots.curves(curves, folder / "kl.png", "slots kept", "KL to the full cache (nats, geometric mean)")]
        if values:
            made.append(
                plots.boxes(values, folder / "kl_10.png", "KL to the full cache per document, 10 % kept (nats)")
            )
        return made


def _paired(rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> str:
    """Ratio of KL over the documents that both have."""
    of = {row["item"]: row["kl"] for row in base}
    both = [row for row in rows if row["item"] in of]
    if not both or rows is base:
        return "-"
    return paired_ratio([row["kl"] for row in both], [of[row["item"]] for row in both]).text()


def _table(rows: Sequence[Mapping[str, Any]], budget: float) -> str:
    by_method = {method: chosen for (method,), chosen in grouped(rows, "method").items()}
    documents_ = len({row["item"] for row in rows})
    columns = (
        "method", "slots", "KL gm [95 %]", "KL p10 / p50 / p90", *(f"KL / {name}" for name in BASES), "top-1 %",
        "perplexity x",
    )  # fmt: skip
    lines: list[Sequence[str]] = []
    for method, chosen in sorted(by_method.items(), key=lambda pair: geometric_mean([r["kl"] for r in pair[1]]).mean):
        kl = [row["kl"] for row in chosen]
        slots, top1 = (mean([r[name] for r in chosen]).mean for name in ("slots", "top1"))
        spread = " / ".join(f"{percentile(kl, p):.3f}" for p in (10, 50, 90))
        paired = [_paired(chosen, by_method.get(base, [])) for base in BASES.values()]
        perplexity = geometric_mean([r["perplexity_ratio"] for r in chosen]).mean
        lines.append(
            (method, f"{slots:.0f}", geometric_mean(kl).text(3), spread, *paired, f"{100 * top1:.1f}",
             f"{perplexity:.3f}")
        )  # fmt: skip
    head = f"**{budget:.0%} of the slots, {documents_} documents**"
    return f"{head}\n\n{tables.markdown(columns, lines)}"


def _by_source(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where methods fail: KL of two of them per source, at 10 %."""
    chosen = [row for row in rows if row["budget"] == 0.1]
    names = [name for name in ("default", SNAPKV, RELEASED) if any(row["method"] == name for row in chosen)]
    if not names:
        return ""
    lines: list[Sequence[str]] = []
    for (source,), mine in grouped(chosen, "source").items():
        cells = [geometric_mean([r["kl"] for r in mine if r["method"] == name] or [math.nan]).mean for name in names]
        lines.append((source, *(f"{x:.3f}" for x in cells)))
    return "**By source, 10 % of the slots (KL gm)**\n\n" + tables.markdown(("source", *names), lines)
