"""Tasks `repeated` and `decoding`: how error grows with the number of compressions, and how often to compress a reply.

repeated: the same text fed in 1, 2, 4, 8 pieces. Finished pieces are left alone (the server's rule, as FlowKV,
arXiv 2505.15347, proposes for turns), or everything is compressed again with every piece; the slots at the end are the
same. decoding: a reply behind a prompt that stays whole, compressed as the server does (conversation_row.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate import fidelity
from keepkv_sglang.tools.evaluate.conversation_row import ConversationRow
from keepkv_sglang.tools.evaluate.documents import Document
from keepkv_sglang.tools.evaluate.methods import DEFAULT, SNAPKV, Method, Ours, compress_tail, slots_of
from keepkv_sglang.tools.evaluate.probe import Row, agreement
from keepkv_sglang.tools.evaluate.results import grouped
from keepkv_sglang.tools.evaluate.task import Setup, ours_only
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import geometric_mean, mean, paired_ratio

PIECES = (1, 2, 4, 8)
PROMPT_TOKENS, FIRST_TOKENS, LAST_TOKENS = 512, 256, 64
REPLY_TOKENS = FIRST_TOKENS + LAST_TOKENS
INTERVALS = (16, 32, 64, 128)
WINDOWS = (16, 32, 64)
BASE_INTERVAL, BASE_WINDOW = KeepKVConfig().interval, KeepKVConfig().window
METHODS = (DEFAULT, SNAPKV)
ALONE, AGAIN = "left alone", "again"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class InPieces(Ours):
    """`again`: everything is compressed with every piece; else each piece once."""

    base: str = ""
    pieces: int = 1
    again: bool = False


class Repeated:
    """KL and top-1 over 128 tokens behind a text that was compressed in 1, 2, 4 or 8 pieces, to the same slots."""

    name = "repeated"

    def items(self, setup: Setup) -> Sequence[Document]:
        return fidelity.Fidelity().items(setup)

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        made: list[tuple[Method, float]] = []
        for base, budget in _servers(setup):
            for pieces, again in [(1, False), *((n, again) for n in PIECES[1:] for again in (False, True))]:
                name = f"{base.name}, {pieces} {AGAIN if again else ALONE}"
                made.append((InPieces(name, base.config, base=base.name, pieces=pieces, again=again), budget))
        return made

    def prepare(self, setup: Setup, item: Document) -> tuple[Document, torch.Tensor]:
        return item, setup.probe.row(item.prompt).feed(item.following)

    def measure(self, setup: Setup, prepared: Any, method: Method, budget: float) -> dict[str, Any]:
        assert isinstance(method, InPieces)
        document, log_probs = prepared
        row = feed_in_pieces(setup.probe.row(), document.prompt, method, budget)
        slots = row.slots
        got = agreement(log_probs, row.feed(document.following), document.following)
        values = {"base": method.base, "pieces": method.pieces, "again": method.again, "source": document.source}
        return {**values, "slots": slots, "kl": got.kl, "top1": got.top1}

    def report(self, rows: Rows) -> str:
        columns = (
            "method", "budget", "pieces", "finished pieces", "documents", "slots", "KL gm [95 %]",
            "KL / one piece [95 %]", "top-1 %", "minus one piece, points",
        )  # fmt: skip
        lines: list[Sequence[object]] = []
        for (base, budget), chosen in sorted(grouped(rows, "base", "budget").items()):
            one = [row for row in chosen if row["pieces"] == 1]
            for (again, pieces), mine in sorted(grouped(chosen, "again", "pieces").items()):
                ratio, gained = _against(mine, one)
                finished = "-" if pieces == 1 else AGAIN if again else ALONE
                slots, top1 = (mean([r[name] for r in mine]).mean for name in ("slots", "top1"))
                kl = geometric_mean([r["kl"] for r in mine]).text(3)
                lines.append(
                    (base, f"{budget:.0%}", pieces, finished, len(mine), f"{slots:.0f}", kl, ratio, f"{100 * top1:.1f}",
                     gained)
                )  # fmt: skip
        return tables.markdown(columns, lines, text=(0, 3))

    def plot(self, rows: Rows, folder: Path) -> list[Path]:
        curves: dict[str, dict[float, float]] = {}
        for (base, budget, pieces), chosen in sorted(grouped(rows, "base", "budget", "pieces").items()):
            for again in (False, True):
                mine = [row for row in chosen if row["again"] == again or pieces == 1]
                if mine:
                    points = curves.setdefault(f"{base}, {budget:.0%}, {AGAIN if again else ALONE}", {})
                    points[pieces] = geometric_mean([row["kl"] for row in mine]).mean
        return [plots.curves(curves, folder / "repeated.png", "pieces", "KL to the full cache (nats, geometric mean)")]


class Decoding:
    """A reply compressed while it grows: KL and top-1 of its beginning and its end, for intervals and windows."""

    name = "decoding"

    def items(self, setup: Setup) -> Sequence[Document]:
        prompt = min(PROMPT_TOKENS, setup.tokens - REPLY_TOKENS)
        if prompt < 1:
            raise ValueError(f"use a --tokens of more than {REPLY_TOKENS} for task {self.name}")
        # The end of fidelity's documents, where bfcl has its talk.
        tokens = prompt + REPLY_TOKENS
        return [
            Document(d.number, d.source, d.half, text[:prompt], text[prompt:])
            for d in fidelity.half_of(setup)
            if (text := (d.prompt + d.following)[-tokens:])
        ]

    def pairs(self, setup: Setup) -> list[tuple[Method, float]]:
        variants = [(n, BASE_WINDOW) for n in INTERVALS] + [(BASE_INTERVAL, n) for n in WINDOWS if n != BASE_WINDOW]
        made: list[tuple[Method, float]] = []
        for base, budget in _servers(setup):
            for interval, window in variants:
                name = f"{base.name}, interval {interval}, window {window}"
                made.append((Ours(name, replace(base.config, interval=interval, window=window)), budget))
        return made

    def prepare(self, setup: Setup, item: Document) -> tuple[Document, Row, torch.Tensor]:
        """With the full cache, log-probabilities in the place of each token that follows the prompt."""
        prompt = setup.probe.row(item.prompt[:-1])
        return item, prompt, prompt.clone().feed([*item.prompt[-1:], *item.following[:-1]])

    def measure(self, setup: Setup, prepared: Any, method: Method, budget: float) -> dict[str, Any]:
        """kl, top1: over the reply's first tokens; last_: over its last. slots: of the reply, mean over its tokens."""
        assert isinstance(method, Ours)
        document, prompt, full = prepared
        row = ConversationRow(prompt.clone(), replace(method.config, budget=budget), border=None)
        row.whole_prompt(document.prompt)
        got = row.reply(document.following)
        fed = [*document.prompt[-1:], *document.following[:-1]]  # each token's row says what follows it
        first, last = (agreement(full[at], got[at], fed[at]) for at in (slice(FIRST_TOKENS), slice(FIRST_TOKENS, None)))
        held = [slots - prompt.slots for slots in row.held]
        return {
            "interval": method.config.interval, "window": method.config.window, "base": method.name.split(",")[0],
            "slots": mean(held).mean, "end_slots": held[-1], "source": document.source,
            "kl": first.kl, "top1": first.top1, "last_kl": last.kl, "last_top1": last.top1,
        }  # fmt: skip

    def report(self, rows: Rows) -> str:
        head = (
            f"Prompt of up to {PROMPT_TOKENS} tokens, whole; reply of {REPLY_TOKENS} tokens under the budget."
            f" Ratios and differences: to interval {BASE_INTERVAL}, window {BASE_WINDOW}, over the same documents."
        )
        columns = (
            "method", "budget", "interval", "window", "documents", "reply slots, mean",
            f"KL first {FIRST_TOKENS} gm [95 %]", "ratio [95 %]", "top-1 %", "points",
            f"KL last {LAST_TOKENS} gm [95 %]", "ratio [95 %]", "top-1 %", "points",
        )  # fmt: skip
        lines: list[Sequence[object]] = []
        for (base, budget), chosen in sorted(grouped(rows, "base", "budget").items()):
            default = [r for r in chosen if (r["interval"], r["window"]) == (BASE_INTERVAL, BASE_WINDOW)]
            for (interval, window), mine in sorted(grouped(chosen, "interval", "window").items()):
                cells = []
                for prefix in ("", "last_"):
                    ratio, gained = _against(mine, default, prefix)
                    kl = geometric_mean([r[f"{prefix}kl"] for r in mine]).text(3)
                    cells += [kl, ratio, f"{100 * mean([r[f'{prefix}top1'] for r in mine]).mean:.1f}", gained]
                slots = f"{mean([r['slots'] for r in mine]).mean:.0f}"
                lines.append((base, f"{budget:.0%}", interval, window, len(mine), slots, *cells))
        return f"{head}\n\n{tables.markdown(columns, lines)}"

    def plot(self, rows: Rows, folder: Path) -> list[Path]:
        """Error along the reply against the slots that the reply holds on average, one line per budget."""
        curves: dict[str, dict[float, float]] = {}
        for (base, budget, interval), chosen in sorted(grouped(rows, "base", "budget", "interval").items()):
            mine = [row for row in chosen if row["window"] == BASE_WINDOW]
            if mine:
                kl = geometric_mean([row["kl"] for row in mine]).mean
                curves.setdefault(f"{base}, {budget:.0%}", {})[interval] = kl
        return [plots.curves(curves, folder / "decoding.png", "interval (tokens)", "KL along the reply (nats, gm)")]


def _servers(setup: Setup) -> list[tuple[Ours, float]]:
    """Those of METHODS, or of the run, that a server can run."""
    return [(m, b) for m, b in ours_only(setup, METHODS) if isinstance(m, Ours) and not m.offline_scorer]


def feed_in_pieces(row: Row, ids: Sequence[int], method: InPieces, budget: float) -> Row:
    """Feeds ids in equal pieces; after each, [0, end) holds ceil(budget * end) slots. Finished pieces are left alone
    but for their recent tokens, as on the server. Returns the row."""
    at = start = left = 0
    for piece in range(1, method.pieces + 1):
        end = piece * len(ids) // method.pieces
        row.feed(ids[at:end], last=1)
        wanted = slots_of(budget, end)
        if wanted > start:
            left = compress_tail(row, method.config, wanted - start, start=start, carried=left)
            start, left = (0, 0) if method.again else (wanted - left, left)
        at = end
    return row


def _against(rows: Rows, base: Rows, prefix: str = "") -> tuple[str, str]:
    """KL ratio and top-1 difference in points over the documents that both have."""
    of = {row["item"]: row for row in base}
    both = [(row, of[row["item"]]) for row in rows if row["item"] in of]
    if not both or [r["method"] for r in rows[:1]] == [r["method"] for r in base[:1]]:
        return "-", "-"
    ratio = paired_ratio([row[f"{prefix}kl"] for row, _ in both], [other[f"{prefix}kl"] for _, other in both])
    points = mean([100 * (row[f"{prefix}top1"] - other[f"{prefix}top1"]) for row, other in both])
    return ratio.text(), points.text(1)
