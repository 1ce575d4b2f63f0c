"""Reads what a server recorded of one request (runtime/record.py), and of earlier ones that left it a prefix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepkv_sglang.runtime.record import in_file_name


@dataclass(frozen=True)
class Compression:
    """One compression: slots [start, start + slots) of the row, logical positions [first, end), became fewer.

    kept[l][h] int [m]: which of the sources keep a slot; assign[l][h] int [sources]: the number among these that each
    source joined, -1: dropped; log_votes[l][h] float32 [m]. Layers and heads may differ in m. originals: the sources
    are the tokens themselves, not the slots. merged_end: position behind the last slot that was not one token's.
    computed: tokens of the row at that time. closed: position behind the tokens that are compressed for good. before,
    target: slots of the pool in front of the span, and those of its result up to `closed`. sequence: its number among
    all of the server.
    """

    rid: str
    sequence: int
    start: int
    slots: int
    first: int
    end: int
    closed: int
    originals: bool
    merged_end: int
    computed: int
    kept: list[list[np.ndarray]]
    assign: list[list[np.ndarray]]
    log_votes: list[list[np.ndarray]]
    before: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class Request:
    """What was recorded of one request. tokens: ids of prompt and answer; protected: ranges of positions; anchor: first
    tokens that are never compressed; config: its settings; answer: meta_info["keepkv"]; time: Unix seconds. earlier:
    compressions of other requests that its row began with."""

    rid: str
    time: float
    tokens: list[int]
    prompt_tokens: int
    anchor: int
    protected: list[list[int]]
    config: dict[str, Any]
    answer: dict[str, Any]
    compressions: list[Compression]
    earlier: list[Compression]


def read(paths: Sequence[Path], rid: str | None = None) -> Request:
    """The request `rid` of these files and folders; without a name the last one that was answered. ValueError where
    they hold none, or not all of its compressions."""
    files = sorted(_files(paths), key=lambda path: path.name)
    answers = [_json(path) for path in _of(files, "json", rid)]
    found = [data for data in answers if rid in (None, data["rid"])]
    if not found:
        wanted = f"request {rid}" if rid else "any request"
        raise ValueError(f"the answer of {wanted} is not among these files, a .json file")
    data = max(found, key=lambda data: data["time"])
    ours = _compressions(_of(files, "pt", data["rid"]), data["rid"])
    if len(ours) < data["answer"].get("compressions", 0):
        raise ValueError(
            f"request {data['rid']} was compressed {data['answer']['compressions']} times, and these files hold"
            f" {len(ours)} of them: name all files with {in_file_name(data['rid'])} in their names, or the folder"
        )
    return Request(**data, compressions=ours, earlier=_earlier(files, data, ours[0]) if ours else [])


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there")
        yield from (p for p in path.iterdir() if p.suffix in (".json", ".pt")) if path.is_dir() else (path,)


def _of(files: Sequence[Path], kind: str, rid: str | None) -> list[Path]:
    """Those of a request, as far as names tell."""
    end = f".{kind}" if rid is None else f"-{in_file_name(rid)}.{kind}"
    return [path for path in files if path.name.endswith(end)]


def _json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def _compressions(files: Sequence[Path], rid: str) -> list[Compression]:
    """In order, the heads of all tensor-parallel ranks beside each other."""
    ranks: dict[int, list[dict[str, Any]]] = {}
    for path in files:
        event = _load(path)
        if event["rid"] == rid:
            event["sequence"] = int(path.name.removeprefix(f"rank{event['rank']}-").partition("-")[0])
            ranks.setdefault(event["rank"], []).append(event)
    if len({len(events) for events in ranks.values()}) > 1:
        raise ValueError(f"ranks {sorted(ranks)} recorded different numbers of compressions: name the files of all")
    return [_one(events) for events in zip(*(ranks[rank] for rank in sorted(ranks)), strict=True)]


def _load(path: Path) -> dict[str, Any]:
    try:
        event: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception:  # half a file leads torch's reader to any of them
        raise ValueError(f"{path} is no whole record of a compression: copy it again") from None
    if "target" not in event:
        raise ValueError(f"{path} was recorded by keepkv-sglang 0.1: record the request again")
    return event


def _one(ranks: Sequence[dict[str, Any]]) -> Compression:
    event = ranks[0]
    layers = range(len(event["kept"]))

    def by_head(name: str) -> list[list[np.ndarray]]:
        return [[row.numpy() for part in ranks for row in part[name][layer]] for layer in layers]

    kept = [[head[head >= 0] for head in heads] for heads in by_head("kept")]  # heads with less are filled up
    votes = [[column.numpy() for part in ranks for column in part["lv"][layer].T] for layer in layers]

    return Compression(
        rid=event["rid"],
        sequence=event["sequence"],
        start=event["start"],
        slots=event["slots"],
        first=event["end"] - event["tokens"],
        end=event["end"],
        closed=event["end"] - event["left"],
        originals=event["originals"],
        merged_end=event["merged_tokens"],
        computed=event["row_tokens"],
        kept=kept,
        assign=by_head("assign"),
        log_votes=[[lv[: len(own)] for lv, own in zip(*pair, strict=True)] for pair in zip(votes, kept, strict=True)],
        before=event["before"].numpy(),
        target=event["target"][: event["m"] - event["left"]].numpy(),
    )


def _earlier(files: Sequence[Path], data: dict[str, Any], first: Compression) -> list[Compression]:
    """What the row began with, between its anchor and its first compression: compressions whose results lie in these
    very slots, for the same tokens, the latest of each. Empty where the files do not hold all of them."""
    if first.first == first.start:
        return []
    slot = position = data["anchor"]
    begin = data["tokens"][: position + 1]
    said = {answer["rid"]: answer["tokens"] for answer in map(_json, _of(files, "json", None))}
    alike = [rid for rid, tokens in said.items() if tokens[: position + 1] == begin]
    others = [event for rid in alike for event in _compressions(_of(files, "pt", rid), rid)]
    found: list[Compression] = []
    while position < first.first:
        here = [
            event
            for event in others
            if (event.start, event.first) == (slot, position)
            and (event.originals or event.slots == event.end - event.first)
            and np.array_equal(event.target, first.before[slot : slot + len(event.target)])
            and said[event.rid][: event.end] == data["tokens"][: event.end]
        ]
        if not here:
            return []
        found.append(max(here, key=lambda event: event.sequence))
        slot, position = slot + len(found[-1].target), found[-1].closed
    return found if (slot, position) == (first.start, first.first) else []
