"""What a reading looks like in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import inf

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from keepkv_sglang.tools.top.reading import Reading

BAR = 14
Row = tuple[str, float | None, str]
"""Label, filled share of the bar or None without one, text."""


def view(now: Reading, before: Reading | None = None, note: str = "") -> RenderableType:
    """before: an earlier reading, for rates; without it there are none. note: the last line."""
    head = Text(f"KeepKV  {now.model}  {now.url}", style="bold", overflow="ellipsis", no_wrap=True)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=12, style="bold", no_wrap=True)
    grid.add_column(width=BAR, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, share, text in rows(now, before):
        grid.add_row(label, _bar(share), Text(text, style="red" if label == "Errors" and now.errors else ""))
    return Group(head, grid, *([Text(note, style="dim", overflow="ellipsis", no_wrap=True)] if note else []))


def _bar(share: float | None) -> RenderableType:
    if share is None:
        return ""
    full = min(max(share, 0.0), 1.0)
    return ProgressBar(total=1.0, completed=full, width=BAR, complete_style="cyan", finished_style="cyan")


def rows(now: Reading, before: Reading | None) -> list[Row]:
    """All that is shown, top to bottom."""
    c, state = now.counters, now.state
    whole = c["answers"] - c["answers_compressed"] - c["answers_off"]
    held, total = c["logical_tokens"] - c["saved_slots"], state["total_slots"]
    used = total - state["available_slots"] - state["evictable_slots"]
    rate = _rates(now, before)
    return [
        ("Budget", None, f"{now.config['budget']:g} {'of the tokens' if now.config['budget'] < 1 else 'slots'}"),
        ("Requests", None, f"{now.running} running, {now.waiting} waiting{rate['answers']}{_speed(now)}"),
        (
            "Ended",
            None,
            f"{c['answers']:,.0f}: {c['answers_compressed']:,.0f} compressed, {whole:,.0f} whole,"
            f" {c['answers_off']:,.0f} off",
        ),
        (
            "Slots",
            _share(held, c["logical_tokens"]),
            f"{held:,.0f} for {c['logical_tokens']:,.0f} tokens{_percent(held, c['logical_tokens'])}",
        ),
        ("Pool", _share(used, total), f"{used:,.0f} of {total:,.0f} in use, {state['evictable_slots']:,.0f} cached"),
        ("Cache", None, f"{state['entries']:,.0f} spans in {state['entry_slots']:,.0f} slots"),
        ("Hits", _share(c["cached_tokens"], c["prompt_tokens"]), _hits(c, "cached_tokens", "of prompt tokens cached")),
        ("", _share(c["hit_tokens"], c["prompt_tokens"]), _hits(c, "hit_tokens", "in compressed spans")),
        ("Compressions", None, f"{c['compressions']:,.0f}{_each(c)}{rate['compressions']}{rate['seconds']}"),
        ("Skipped", None, _skipped(c)),
        ("Pressure", None, _pressure(now)),
        (
            "Arena",
            _share(state["arena_rows"] - state["arena_free_rows"], state["arena_rows"]),
            f"{state['arena_rows'] - state['arena_free_rows']:,.0f} of {state['arena_rows']:,.0f} rows,"
            f" {state['arena_peak_rows']:,.0f} at most",
        ),
        ("Host tier", *_host(now)),
        ("Votes", None, _votes(now.votes)),
        ("Errors", None, ", ".join(f"{name} {count}" for name, count in now.errors.items()) or "none"),
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percent(part: float, whole: float) -> str:
    return f", {100 * part / whole:.0f} %" if whole else ""


def _hits(c: Mapping[str, float], name: str, what: str) -> str:
    return f"{100 * _share(c[name], c['prompt_tokens']):.0f} % {what}"


def _each(c: Mapping[str, float]) -> str:
    return f", {1e3 * c['seconds'] / c['compressions']:.1f} ms each" if c["compressions"] else ""


def _speed(now: Reading) -> str:
    return f", {now.tokens_per_s:,.0f} tokens/s" if now.running and now.tokens_per_s else ""


def _rates(now: Reading, before: Reading | None) -> dict[str, str]:
    """What is added where an earlier reading tells how fast it goes."""
    if before is None or now.when <= before.when:
        return {"answers": "", "compressions": "", "seconds": ""}
    new = {name: (now.counters[name] - before.counters[name]) / (now.when - before.when) for name in now.counters}
    return {
        "answers": f", {new['answers']:.1f} ended/s",
        "compressions": f", {new['compressions']:.1f}/s",
        "seconds": f", {100 * new['seconds']:.0f} % of the time",
    }


def _skipped(c: Mapping[str, float]) -> str:
    skipped = {
        "no slots": c["skipped_no_room"],
        "arena full of prompts": c["skipped_no_window"],
        "of replies": c["skipped_reply_window"],
    }
    count = sum(skipped.values())
    if not count:
        return "none"
    due = f"{100 * count / (count + c['compressions']):.0f} % of what was due: "
    return due + ", ".join(f"{why} {n:,.0f}" for why, n in skipped.items() if n)


def _pressure(now: Reading) -> str:
    c = now.counters
    merged = f"{c['pressure_tokens']:,.0f} cold tokens merged" if now.config["pressure"] != "off" else "merging off"
    return f"{merged}, {c['retractions_published']:,.0f} retractions, {c['parked']:,.0f} parked"


def _host(now: Reading) -> tuple[float | None, str]:
    kept = now.originals
    if kept is None:
        return None, "off"
    used = kept["blocks"] - kept["free_blocks"]
    back = now.counters["unpacked_tokens"] + now.counters["streamed_tokens"]
    size = now.state["originals_bytes"] / 1e9
    return _share(used, kept["blocks"]), (
        f"{kept['tokens']:,.0f} tokens in {size * _share(used, kept['blocks']):.2f} of {size:.2f} GB, {now.codec};"
        f" {back:,.0f} read"
    )


def _votes(votes: Mapping[float, float]) -> str:
    """How many tokens a slot that a compression wrote stands for."""
    if not votes:
        return "only with --enable-metrics"
    total = sum(votes.values())
    if not total:
        return "none yet"
    sums = list(zip(votes, accumulate(votes.values()), strict=True))

    def up_to(share: float) -> str:
        bound = next(bound for bound, below in sums if below >= share * total)
        return f"at most {bound:g}" if bound < inf else f"over {max(set(votes) - {inf}):g}"

    return f"median {up_to(0.5)}, 90th percentile {up_to(0.9)}"
