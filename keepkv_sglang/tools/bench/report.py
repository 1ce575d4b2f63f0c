"""JSON, Markdown and plots of `keepkv bench agents`. A row is one run: one server, one pool, one repeat."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.report.statistics import median

Row = Mapping[str, Any]


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: "–" if math.isnan(value) else f"{value:,.{digits}f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


_whole, _tenth, _fine = _number(0), _number(1), _number(3)
SPEED: dict[str, tuple[str, Callable[[float], str]]] = {
    "requests/s": ("requests_per_s", _fine),
    "generated/s": ("generated_per_s", _tenth),
    "seconds": ("seconds", _tenth),
    "TTFT p50": ("ttft_p50", _number(2)),
    "p90": ("ttft_p90", _number(2)),
    "p99": ("ttft_p99", _number(2)),
    "latency p50": ("latency_p50", _number(2)),
    "p90 ": ("latency_p90", _number(2)),
    "p99 ": ("latency_p99", _number(2)),
    "gap p50": ("gap_p50", _fine),
    "p99  ": ("gap_p99", _fine),
}
MEMORY: dict[str, tuple[str, Callable[[float], str]]] = {
    "hit rate": ("hit_rate", _percent),
    "of it compressed": ("compressed_share", _percent),
    "slots held": ("slots_held", _whole),
    "per token": ("slots_per_token", _fine),
    "running mean": ("running_mean", _tenth),
    "max": ("running_max", _whole),
    "retractions": ("retractions", _whole),
    "prefill tokens": ("prefill_tokens", _whole),
    "errors": ("errors", _whole),
    "short": ("short_answers", _whole),
}
TIME: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill s": ("prefill_s", _tenth),
    "decode phase s": ("decode_phase_s", _tenth),
    "decoded/s": ("decode_per_s", _tenth),
    "decode steps s": ("decode_step_s", _tenth),
    "decoded/s in steps": ("decode_step_per_s", _tenth),
    "compressions": ("compressions", _whole),
    "s": ("compress_s", _number(2)),
    "of wall": ("compress_share", _percent),
    "with bookkeeping": ("hook_share", _percent),
}
OUTPUT: dict[str, tuple[str, Callable[[float], str]]] = {
    "mean output": ("mean_output", _tenth),
    "compared": ("compared", _whole),
    "agreed": ("agreed", _percent),
    "first token": ("first_token", _percent),
    "identical": ("identical", _percent),
}


def middle(rows: Sequence[Row], key: str) -> float:
    """Median of one number over repeats; NaN when it applies to none of them."""
    return median([row[key] for row in rows if row.get(key) is not None])


def groups(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """Rows by (pool, server), pools from ample to tight, servers in order of appearance."""
    out: dict[tuple[int, str], list[Row]] = {}
    for pool in sorted({row["pool"] for row in rows}, reverse=True):
        for row in rows:
            if row["pool"] == pool:
                out.setdefault((pool, row["server"]), []).append(row)
    return out


def table(rows: Sequence[Row], columns: Mapping[str, tuple[str, Callable[[float], str]]]) -> str:
    """One line per pool and server, medians of the repeats."""
    lines = [
        [f"{pool:,}", server, *(show(middle(group, key)) for key, show in columns.values())]
        for (pool, server), group in groups(rows).items()
    ]
    return tables.markdown(["pool", "server", *columns], lines, text=(1,))


def paired(rows: Sequence[Row], key: str, base: str) -> list[tuple[int, str, list[float]]]:
    """(pool, server, ratios to `base` at the same pool in the same repeat) for every other server."""
    found = {(row["pool"], row["server"], row["repeat"]): row[key] for row in rows}
    out = []
    for (pool, server), group in groups(rows).items():
        pairs = [(row[key], found.get((pool, base, row["repeat"]), math.nan)) for row in group]
        ratios = [mine / other for mine, other in pairs if other and not math.isnan(mine / other)]
        if server != base and ratios:
            out.append((pool, server, ratios))
    return out


def ratios(rows: Sequence[Row], keys: Mapping[str, str], base: str) -> str:
    """Median of the paired ratios to one server, smallest and largest beside it; empty when it is alone."""
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for name, key in keys.items():
        for pool, server, values in paired(rows, key, base):
            text = f"{median(values):.2f}x ({min(values):.2f}–{max(values):.2f})"
            cells.setdefault((pool, server), {})[name] = text
    lines = [[f"{pool:,}", server, *(found.get(name, "–") for name in keys)] for (pool, server), found in cells.items()]
    return tables.markdown(["pool", "server", *keys], lines, text=(1,)) if cells else ""


def turns(rows: Sequence[Row]) -> str:
    """Seconds, slots and hit rate by turn, medians of the repeats; empty for workloads without turns."""
    if not any(len(row.get("by_turn", {})) > 1 for row in rows):
        return ""
    lines = []
    for (pool, server), group in groups(rows).items():
        for turn in sorted({int(t) for row in group for t in row["by_turn"]}):
            found = [row["by_turn"][str(turn)] for row in group if str(turn) in row["by_turn"]]
            values = [middle(found, key) for key in ("tokens", "slots", "hit_rate", "seconds")]
            shown = [_whole(values[0]), _whole(values[1]), _percent(values[2]), _number(2)(values[3])]
            lines.append([f"{pool:,}", server, turn + 1, *shown])
    columns = ["pool", "server", "turn", "tokens", "slots held", "hit rate", "seconds"]
    return tables.markdown(columns, lines, text=(1,))


def markdown(rows: Sequence[Row], origin: str, about: Sequence[str], base: str) -> str:
    """The whole report. origin: command, commit, date, machine; base: the server that ratios are taken to."""
    repeats = len({row["repeat"] for row in rows})
    parts = ["# keepkv bench agents", origin, "\n".join(f"- {line}" for line in about)]
    parts.append(f"Medians of {repeats} run{'s' if repeats > 1 else ''}. Times in seconds.")
    keys = {
        "requests/s": "requests_per_s",
        "generated/s": "generated_per_s",
        "decoded/s in the decode phase": "decode_per_s",
        "running mean": "running_mean",
        "latency p50": "latency_p50",
    }
    found = ratios(rows, keys, base)
    if found:
        parts += [f"## Beside {base}", "Medians of paired ratios, the smallest and largest in brackets.", found]
    for title, columns in (("Speed", SPEED), ("Memory", MEMORY), ("Where the time goes", TIME), ("Output", OUTPUT)):
        parts += [f"## {title}", table(rows, columns)]
    if by_turn := turns(rows):
        parts += ["## By turn", by_turn]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """PNGs beside the report: rate over the pool where there are several, seconds and slots by turn. May be none."""
    made: list[Path] = []
    if not plots.available():
        return made
    grouped = groups(rows)
    pools = sorted({pool for pool, _ in grouped})
    servers = list(dict.fromkeys(server for _, server in grouped))
    if len(pools) > 1:
        for key, label in (("requests_per_s", "requests per second"), ("hit_rate", "hit rate")):
            by_pool: dict[str, dict[float, float]] = {
                s: {p: middle(grouped[p, s], key) for p in pools if (p, s) in grouped} for s in servers
            }
            made.append(plots.curves(by_pool, folder / f"{key}.png", "KV pool, slots", label, log=False))
    if turns(rows):
        for key, label in (("seconds", "seconds per turn"), ("slots", "slots held after the turn")):
            curves = {f"{s}, pool {p:,}": _turn_curve(grouped[p, s], key) for p, s in grouped}
            made.append(plots.curves(curves, folder / f"turn_{key}.png", "turn", label, log=False))
    return made


def _turn_curve(rows: Sequence[Row], key: str) -> dict[float, float]:
    numbers = sorted({int(turn) for row in rows for turn in row["by_turn"]})
    return {
        turn + 1: middle([row["by_turn"][str(turn)] for row in rows if str(turn) in row["by_turn"]], key)
        for turn in numbers
    }


def write(rows: Sequence[Row], folder: Path, settings: Mapping[str, Any], text: str) -> None:
    """results.json (NaN as null) and report.md. Called after every run: an interrupted benchmark keeps what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    data = _plain({"settings": settings, "runs": list(rows)})
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "report.md").write_text(text)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
