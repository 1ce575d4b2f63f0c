"""Task `parity`: where our scorer and a kvpress press are the same method, KL must agree.

Each pair keeps the same number of tokens, with the same window, pooling, sinks and recent tokens; both sides drop
what they do not keep. What differs from the server's defaults, and why:

- SnapKV: the last 32 tokens stay, no sinks. Ours also scores the window and pools over the tokens that exist at the
  edges; kvpress pools with zeros there. kvpress runs with our window 32 and kernel 7 (its defaults: 64 and 5).
- TOVA: the paper averages over all heads of a layer and keeps the same tokens in all; `tova` of the server averages
  over the heads of one kv head, since a kv head's slots are its own. Here: `tova_all_heads`. The last token stays.
- Knorm: neither sinks nor recent tokens.
- ExpectedAttention: the paper's moments need every query of the prompt, so ours is the offline form
  (future.py). Four sinks, no recent tokens.
- KeyDiff, StreamingLLM: as the papers, too; not asked for, but cheap.

kvpress is imported where it is used: optional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.compress.scorers import get_scorer
from keepkv_sglang.compress.window import Window
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.documents import SOURCES, Document
from keepkv_sglang.tools.evaluate.fidelity import Fidelity
from keepkv_sglang.tools.evaluate.future import ExpectedAttentionFull
from keepkv_sglang.tools.evaluate.methods import Ours, ours
from keepkv_sglang.tools.evaluate.results import grouped
from keepkv_sglang.tools.evaluate.task import Setup
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.report.statistics import geometric_mean, paired_ratio

TOLERANCE = 0.03
BUDGETS = (0.1, 0.2)


def tova_all_heads(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: TOVA's attention, mean over all q heads of the layer, the same in each kv head (arXiv 2401.06104).

    Offline: `window` must hold all kv heads of the layer, as it does with one query (compress_layer groups heads by
    the size of their logits); a server's heads may be on other ranks.
    """
    scores = get_scorer("tova")(window, pool_kernel)
    return scores.mean(dim=0, keepdim=True).expand_as(scores)


def _evict(name: str, scorer: str, **settings: int) -> Ours:
    return ours(f"ours {name}", scorer=scorer, merge="evict", **settings)


PAIRS: dict[str, tuple[Ours | ExpectedAttentionFull, str]] = {
    "SnapKV": (
        _evict("SnapKV", "snapkv", window=32, recent=32, sinks=0),
        "kvpress SnapKV (window 32, kernel 7)",
    ),
    "TOVA": (
        _evict("TOVA", f"{__name__}:tova_all_heads", window=1, recent=1, sinks=0),
        "kvpress TOVA",
    ),
    "Knorm": (_evict("Knorm", "knorm", recent=0, sinks=0), "kvpress Knorm"),
    "ExpectedAttention": (
        ExpectedAttentionFull("ours ExpectedAttention", KeepKVConfig(enabled=True, merge="evict", recent=0)),
        "kvpress ExpectedAttention",
    ),
    "KeyDiff": (_evict("KeyDiff", "keydiff", recent=0, sinks=0), "kvpress KeyDiff"),
    "StreamingLLM": (_evict("StreamingLLM", "streaming_llm", recent=0, sinks=4), "kvpress StreamingLLM"),
}
"""Method -> our side and the name of kvpress's."""


class Parity(Fidelity):
    """Same method, same input: KL of our implementation against kvpress 0.5.5's, which must agree within 3 %."""

    name = "parity"

    def items(self, setup: Setup) -> Sequence[Document]:
        """Ten documents of the half unless --items says otherwise."""
        return super().items(setup) if setup.items else super().items(_with_items(setup, len(SOURCES)))

    def pairs(self, setup: Setup) -> list[tuple[Any, float]]:
        """Its own methods, not setup.methods; budgets 10 and 20 % where these are asked for."""
        from keepkv_sglang.tools.evaluate.peers import PEERS, load

        load()
        budgets = [budget for budget in setup.budgets if budget in BUDGETS] or setup.budgets
        return [(side, b) for b in budgets for mine, theirs in PAIRS.values() for side in (mine, PEERS[theirs])]

    def report(self, rows: Sequence[Mapping[str, Any]]) -> str:
        columns = (
            "method", "slots kept", "documents", "KL gm, ours", "KL gm, kvpress", "ours / kvpress [95 %]",
            f"within {100 * TOLERANCE:g} %",
        )  # fmt: skip
        lines: list[Sequence[object]] = []
        for (budget,), chosen in grouped(rows, "budget").items():
            by_method: dict[str, dict[int, float]] = {}
            for row in chosen:
                by_method.setdefault(row["method"], {})[row["item"]] = row["kl"]
            for label, (mine, theirs) in PAIRS.items():
                a, b = by_method.get(mine.name, {}), by_method.get(theirs, {})
                both = sorted(a.keys() & b.keys())
                if both:
                    lines.append(_line(label, budget, [a[i] for i in both], [b[i] for i in both]))
        return tables.markdown(columns, lines)

    def plot(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
        return []


def _line(label: str, budget: float, mine: Sequence[float], theirs: Sequence[float]) -> Sequence[object]:
    ratio = paired_ratio(mine, theirs)
    verdict = "PASS" if abs(ratio.mean - 1) <= TOLERANCE else "FAIL"
    kl = (f"{geometric_mean(side).mean:.4f}" for side in (mine, theirs))
    return label, f"{budget:.0%}", len(mine), *kl, ratio.text(3), verdict


def _with_items(setup: Setup, items: int) -> Setup:

    return replace(setup, items=items)
