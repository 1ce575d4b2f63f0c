"""Replay results as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.report import plots, tables

from .replay import Result
from .search import Claim

_COLUMNS = (
    ("policy", lambda r: r.policy),
    ("budget", lambda r: "-" if r.budget is None else str(r.budget)),
    ("span", lambda r: str(r.span_tokens) if r.budget is not None else "-"),
    ("pool", lambda r: _tokens(r.pool)),
    ("hit rate", lambda r: f"{100 * r.hit_rate:.2f} %"),
    ("of admitted", lambda r: f"{100 * r.admitted_hit_rate:.2f} %"),
    ("unpacked", lambda r: _tokens(r.unpacked_tokens)),
    ("on the host", lambda r: _tokens(r.host_tokens)),
    ("recomputed", lambda r: _tokens(r.recomputed_tokens)),
    ("evicted", lambda r: _tokens(r.evicted_slots)),
    ("merges", lambda r: f"{r.compressions:,}"),
    ("rejected", lambda r: str(r.rejected)),
    ("waited", lambda r: f"{r.waited} ({r.waited_seconds:.0f} s)"),
    ("peak slots", lambda r: _tokens(r.peak_slots)),
    ("match µs", lambda r: _micro(r, "match")),
    ("insert µs", lambda r: _micro(r, "insert")),
    ("evict µs", lambda r: _micro(r, "evict")),
)


def _tokens(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1_000_000 else f"{count / 1e3:.0f} k" if count >= 1000 else str(count)


def _micro(result: Result, name: str) -> str:
    value = result.microseconds.get(name)
    return "-" if value is None else f"{value:.0f}"


def table(results: list[Result]) -> str:
    """Aligned columns, as Markdown."""
    return tables.markdown([name for name, _ in _COLUMNS], [[cell(r) for _, cell in _COLUMNS] for r in results])


def write_json(path: Path, results: list[Result], claims: list[Claim], settings: dict[str, Any]) -> None:
    """Everything measured, with what it was measured with."""
    data = {
        "settings": settings,
        "results": [{"hit_rate": r.hit_rate, "admitted_hit_rate": r.admitted_hit_rate, **asdict(r)} for r in results],
        "claims": [
            {
                "budget": c.keepkv.budget,
                "span_tokens": c.keepkv.span_tokens,
                "pool": c.keepkv.pool,
                "stock_ideal": c.ideal.hit_rate,
                "stock": c.stock.hit_rate,
                "keepkv_ceiling": c.ceiling.hit_rate,
                "keepkv": c.keepkv.hit_rate,
                "share_of_ceiling": c.share_of_ceiling,
            }
            for c in claims
        ],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def require_matplotlib() -> None:
    """ValueError where it is missing: it is no dependency of the project, only this plot needs it."""
    if not plots.available():
        raise ValueError("--plot needs matplotlib; pip install matplotlib, or use --json")


def plot(path: Path, results: list[Result], title: str) -> None:
    """Hit rate over pool size, one line per policy, budget and span length."""
    require_matplotlib()
    lines: dict[str, dict[float, float]] = {}
    for r in sorted(results, key=lambda r: r.pool):
        name = (
            "stock" if r.budget is None else f"keepkv {r.budget}" + (f", span {r.span_tokens}" if r.span_tokens else "")
        )
        lines.setdefault(name, {})[r.pool] = 100 * r.hit_rate
    plots.curves(lines, path, "KV pool (slots)", "token hit rate (%)", log=False, log_x=True, bottom=0, title=title)
