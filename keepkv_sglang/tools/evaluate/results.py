"""Rows of results on disk, one JSON object per line, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KEY = ("task", "method", "budget", "item")
OFF = "off"
ORIGINALS = (OFF, "native", "int8", "int4")
"""How the K/V of compressed tokens are kept and read again (originals.py): a row's "originals"; without it, OFF."""


class Results:
    """An append-only file of rows; a row is known by its KEY fields and its originals.

    The first line describes the run (model, lengths, options that change results). Opening a file whose description
    differs is a ValueError: numbers of two set-ups do not belong in one table. beside: files of other processes that
    share the run; their rows are read, once.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], beside: Sequence[Path] = ()) -> None:
        self.path = path
        description = json.loads(json.dumps(dict(description)))
        path.parent.mkdir(parents=True, exist_ok=True)
        own = _rows(path, description) if path.exists() else []
        # Written anew: a cut-off last line must not swallow the next one.
        path.write_text("".join(json.dumps(row) + "\n" for row in [description, *own]))
        rows = [*own, *(row for other in beside if other.stat().st_size for row in _rows(other, description))]
        self.rows = list({_key(row): row for row in rows}.values())
        self._known = {_key(row) for row in self.rows}

    def has(self, task: str, method: str, budget: float, item: Any, originals: str = OFF) -> bool:
        """True when that measurement is there."""
        return (task, method, budget, item, originals) in self._known

    def add(self, task: str, method: str, budget: float, item: Any, **values: Any) -> None:
        """Appends one measurement and flushes it to the file."""
        row = {"task": task, "method": method, "budget": budget, "item": item, **values}
        self.rows.append(row)
        self._known.add(_key(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, task: str) -> list[dict[str, Any]]:
        """All rows of a task."""
        return [row for row in self.rows if row["task"] == task]


def _rows(path: Path, description: Mapping[str, Any]) -> list[dict[str, Any]]:
    head, *rest = path.read_text().splitlines() or [""]
    if not _parsed(head) or json.loads(head) != description:
        raise ValueError(f"{path} was made with other settings: give another --out, or remove it")
    return [row for row in map(_parsed, rest) if row]  # a line cut off by an interruption is made again


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return *(row[name] for name in KEY), row.get("originals", OFF)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def variants(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with "originals" and, as "variant", with what tables call its method then."""
    return [
        {**row, "originals": kept, "variant": row["method"] if kept == OFF else f"{row['method']}, originals {kept}"}
        for row in rows
        for kept in [row.get("originals", OFF)]
    ]


def grouped(rows: Iterable[Mapping[str, Any]], *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Rows by the values of `names`, in order of appearance."""
    out: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault(tuple(row[name] for name in names), []).append(row)
    return out
