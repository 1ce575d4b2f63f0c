"""Block-hash traces as requests, and requests as token ids.

Two formats: the coding-agent sessions of kv-cache-tester (one JSON object, ids of full 64-token blocks, local to the
file) and Mooncake's traces (JSON lines, ids of 512-token blocks, the last one partial). In both an id names a block
together with everything before it, so equal ids mean equal prefixes.
"""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from keepkv_sglang.tools.places import data_folder

BORDER = 0  # the token id that ends a first message; blocks count from 1
MOST_FORKS = 2  # a retry or an edited turn leaves a conversation once
_UNIQUE = 1 << 40  # ids from here on occur once


@dataclass(frozen=True)
class Request:
    """One request of a trace. Lengths in real tokens, times in seconds.

    blocks: ids of the full blocks of the prompt; tail_key: what names the tokens behind them. first_message: tokens of
    the first message, 0 where the trace does not say. seconds, first_token: how long it took, and until its first
    token, where the trace says so. parent: index of the request whose reply this prompt carries on, or -1.
    """

    time: float
    prompt: int
    reply: int
    blocks: tuple[int, ...]
    tail_key: tuple[Any, ...]
    block_tokens: int
    first_message: int = 0
    seconds: float | None = None
    first_token: float | None = None
    group: str = ""
    parent: int = -1


def load(names: list[str], data: Path | None = None, limit: int = 0) -> list[Request]:
    """The requests of all traces in order of time, each trace starting at 0, ids distinct between traces.

    names: files or folders, as they are or below the data folder; a folder stands for its *.json and *.jsonl files.
    limit: only the first so many requests, 0 for all. ValueError for what is missing or malformed.
    """
    requests: list[Request] = []
    first_id = 1
    for path in (file for name in names for file in _files(name, data)):
        trace = _parse(path)
        start = min((r.time for r in trace), default=0.0)
        requests += [
            replace(r, time=r.time - start, blocks=tuple(first_id + b for b in r.blocks), tail_key=(path, *r.tail_key))
            for r in trace
        ]
        first_id += 1 + max((b for r in trace for b in (*r.blocks, r.tail_key[0])), default=0)
    requests.sort(key=lambda r: r.time)  # stable: equal times stay in the order of the files
    requests = requests[: limit or None]
    if not requests:
        raise ValueError("the traces hold no requests")
    return link(requests)


def _files(name: str, data: Path | None) -> list[Path]:
    try:
        path = Path(name) if Path(name).exists() else data_folder(data, name) / name
    except ValueError as error:
        raise ValueError(f"no trace {name!r} here, and {error}") from None
    files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no *.json or *.jsonl")
    return files


def _parse(path: Path) -> list[Request]:
    try:
        if path.suffix == ".jsonl":
            with path.open() as lines:
                return [_mooncake(json.loads(line)) for line in lines if line.strip()]
        trace = json.loads(path.read_text())
        first = int(trace["tool_tokens"]) + int(trace["system_tokens"])
        size = int(trace["block_size"])
        return [_agent(row, size, first, str(trace["id"])) for row in trace["requests"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is neither an agent trace nor a Mooncake trace: {error!r}") from error


def _agent(row: dict[str, Any], size: int, first_message: int, group: str) -> Request:
    prompt = int(row["in"])
    full = tuple(row["hash_ids"][: prompt // size])
    # The rest of the prompt, less than a block, has no id: equal blocks and equal length are taken as equal tokens.
    return Request(
        time=float(row["t"]),
        prompt=prompt,
        reply=int(row["out"]),
        blocks=full,
        tail_key=(full[-1] if full else 0, "agent", prompt),
        block_tokens=size,
        first_message=first_message // size * size,
        seconds=row.get("api_time"),
        first_token=row.get("ttft"),
        group=group,
    )


def _mooncake(row: dict[str, Any], size: int = 512) -> Request:
    prompt = int(row["input_length"])
    ids = row["hash_ids"]
    full = tuple(ids[: prompt // size])
    tail = ids[len(full)] if len(ids) > len(full) else full[-1] if full else 0
    return Request(row["timestamp"] / 1000, prompt, int(row["output_length"]), full, (tail, "mooncake"), size)


def link(requests: list[Request]) -> list[Request]:
    """Finds the request that each one carries on: the longest earlier prompt that, with its reply, fits inside it.

    Traces name prompts, not replies; an agent feeds its reply back. Each request is carried on once. None where the
    trace does not say which one it was: the last full block is one that many prompts share, such as a system prompt
    (more than MOST_FORKS different blocks follow it), or earlier prompts of several lengths end in it.
    """
    followers: dict[int, set[int]] = defaultdict(set)
    for request in requests:
        for block, after in pairwise(request.blocks):
            followers[block].add(after)
    open_ends: dict[int, list[int]] = defaultdict(list)  # id of the last full block -> requests not yet carried on
    linked: list[Request] = []
    for index, request in enumerate(requests):
        parent = -1
        for block in reversed(request.blocks):
            fitting = [i for i in open_ends.get(block, ()) if requests[i].prompt + requests[i].reply <= request.prompt]
            if fitting:
                if len(followers[block]) <= MOST_FORKS and len({requests[i].prompt for i in fitting}) == 1:
                    parent = fitting[-1]
                    open_ends[block].remove(parent)
                break
        if request.blocks:
            open_ends[request.blocks[-1]].append(index)
        linked.append(replace(request, parent=parent))
    return linked


@dataclass(frozen=True)
class Workload:
    """Requests as token ids at one scale: `scale` real tokens are one simulated token."""

    scale: int
    requests: list[Request]
    prompts: list[array[int]]
    replies: list[array[int]]

    @property
    def longest(self) -> int:
        """Simulated tokens of the longest prompt with its reply."""
        return max(len(p) + len(r) for p, r in zip(self.prompts, self.replies, strict=True))

    @property
    def total(self) -> int:
        """Simulated tokens of everything: a pool of this size never evicts."""
        return sum(len(p) + len(r) for p, r in zip(self.prompts, self.replies, strict=True))


def tokenize(requests: list[Request], scale: int) -> Workload:
    """Token ids of every prompt and reply. ValueError when `scale` does not divide the block sizes.

    A block's ids follow from its own. What is behind the last full block, and the reply, are taken from the request
    that carries this one on, else they are unique. The last token of a first message is BORDER.
    """
    for size in {r.block_tokens for r in requests}:
        if scale < 1 or size % scale:
            raise ValueError(f"--scale {scale} must divide the trace's block of {size} tokens; use 1, 2, 4, 8 or 16")
    child = {r.parent: i for i, r in enumerate(requests) if r.parent >= 0}
    tail_child: dict[tuple[Any, ...], int] = {}  # twins of a request that was carried on have its tail
    for parent, index in child.items():
        tail_child.setdefault(requests[parent].tail_key, index)
    prompts: list[array[int]] = [array("q")] * len(requests)
    replies: list[array[int]] = [array("q")] * len(requests)
    tails: dict[tuple[Any, ...], array[int]] = {}
    unique = _UNIQUE

    def fresh(count: int) -> array[int]:
        nonlocal unique
        unique += count
        return array("q", range(unique - count, unique))

    # Longest first: who carries a request on is longer, so its tokens are known by then.
    for index in sorted(range(len(requests)), key=lambda i: -requests[i].prompt):
        request = requests[index]
        known = _block_tokens(request, scale)
        length = max(2, request.prompt // scale)
        reply = max(1, -(-request.reply // scale))
        tail = max(0, length - len(known))
        heir = child.get(index, tail_child.get(request.tail_key, -1))
        source = prompts[heir][len(known) :] if heir >= 0 else array("q")
        shared = tails.setdefault(request.tail_key, source[:tail])
        shared.extend(fresh(tail - len(shared)))
        prompts[index] = known + shared[:tail]
        given = source[tail : tail + reply] if index in child else array("q")
        replies[index] = given + fresh(reply - len(given))
    return Workload(scale, requests, prompts, replies)


def _block_tokens(request: Request, scale: int) -> array[int]:
    size = request.block_tokens // scale
    ids = np.asarray(request.blocks, dtype=np.int64)[:, None] * size + np.arange(size, dtype=np.int64)
    flat = ids.reshape(-1)
    border = request.first_message // scale
    if 0 < border <= len(flat):
        flat[border - 1] = BORDER
    return array("q", flat.tobytes())
