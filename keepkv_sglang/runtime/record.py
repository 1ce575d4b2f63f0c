"""Writes down what a request said and what compression made of it: `keepkv inspect` makes a page of it, and tests
replay it in float64.

Off unless --keepkv-record names a folder. Only the server's user can read the files.

| file | what | when |
|---|---|---|
| `<sequence>-<rid>.pt` | one compression, a dict that torch.load reads: positions, clusters and votes | as it is done |
| `<sequence>-<rid>.json` | the request's tokens and its answer's numbers | with its answer |

Tensor-parallel ranks above 0 write `rank<r>-<sequence>-<rid>.pt`, each its own heads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from keepkv_sglang.faults import guard
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.requests import known_state, logical_tokens
from keepkv_sglang.turn.spans import DueSpan
from keepkv_sglang.turn.state import RequestState

_sequence = itertools.count()


class Recorder:
    """Collects one compression: kept [layers, H, m], assign [layers, H, sources] and log votes lv [layers, m, H]. Where
    heads keep different numbers of tokens m is the largest, and what a head does not have is -1 and -inf."""

    def __init__(self, path: str, layers: int, facts: dict[str, Any]) -> None:
        self.path, self.layers, self.facts = path, layers, facts
        self.kept: list[torch.Tensor] = []  # per head
        self.assign: list[torch.Tensor] = []
        self.lv: list[torch.Tensor] = []

    def add(self, result: Any) -> None:
        """The next layer's, or the next head's."""
        self.kept += result.kept.cpu()
        self.assign += result.assign.cpu()
        self.lv += result.lv.cpu().T

    def write(self) -> None:
        """The file."""
        found = {"kept": pad_sequence(self.kept, True, -1), "assign": torch.stack(self.assign)}
        found["lv"] = pad_sequence(self.lv, True, -math.inf)
        data = {name: x.view(self.layers, -1, x.shape[1]) for name, x in found.items()} | self.facts
        data["lv"] = data["lv"].mT
        _write(self.path, lambda file: torch.save(data, file))


def begin(
    rt: Runtime, req: Any, state: RequestState, span: DueSpan, before: torch.Tensor, target: torch.Tensor
) -> Recorder | None:
    """A recorder for this compression, or None when nothing is recorded.

    before: the row's slots in front of the span, target: those that it is merged into. By them a later turn's record
    finds this one.
    """
    if not rt.config.record:
        return None
    queries, policy = span.queries, span.policy
    return Recorder(
        _path(rt, req, "pt"),
        rt.kv_pool.layer_num,
        {
            "rid": str(req.rid),
            "rank": rt.rank,
            "start": span.start,
            "slots": span.slots,
            "tokens": span.tokens,
            "end": span.end,
            "m": span.m,
            "left": span.left,
            "originals": span.originals,
            "before": before.to(torch.int32).cpu(),
            "target": target.to(torch.int32).cpu(),
            "merged_tokens": state.merged_tokens,
            "row_tokens": req.kv.kv_committed_len + state.offset,
            "window": list(queries.positions[: queries.filled]),
            "references": queries.references,
            "merge": policy.merge,
            "recent": policy.recent,
            "carried": policy.carried,
            "sinks": policy.sinks,
            "threshold": policy.threshold,
            "scorer": policy.scorer,
            "chunk": policy.chunk,
            "whole": policy.whole,
            "shares": policy.shares,
            "prefill_tokens": state.prefill_tokens,
            "prompt_tokens": state.prompt_tokens,
            "retractions": req.retraction_count,
        },
    )


def finish(rt: Runtime, req: Any, answer: dict[str, Any]) -> None:
    """The request's tokens and `answer`, its meta_info["keepkv"]. Of a request that has nothing compressed, such as a
    health check, nothing is written."""
    state = known_state(req)
    if not rt.config.record or rt.rank or state is None:
        return
    if not (state.compressions or state.cached_compressed_tokens):
        return
    tokens = list(logical_tokens(req))
    data = {
        "rid": str(req.rid),
        "time": time.time(),
        "tokens": tokens,
        "prompt_tokens": len(req.origin_input_ids),
        "anchor": state.anchor_len,
        "protected": state.protection.whole_in(0, len(tokens)),
        "config": asdict(state.config),
        "answer": answer,
    }
    _write(_path(rt, req, "json"), lambda file: file.write(json.dumps(data).encode()))


def _path(rt: Runtime, req: Any, kind: str) -> str:
    """Tensor-parallel ranks record the same compression, each its own heads: rank 0 under the plain name."""
    rank = f"rank{rt.rank}-" if rt.rank else ""
    return os.path.join(rt.config.record, f"{rank}{next(_sequence):05d}-{in_file_name(str(req.rid))}.{kind}")


def in_file_name(rid: str) -> str:
    """The beginning of a request id, which a client may choose, without what means something to a file system."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", rid[:16])


def _write(path: str, fill: Callable[[IO[bytes]], Any]) -> None:
    """A file that is there whole or not at all. A disk that is full costs the record, not the request."""
    try:
        with _private(path + ".tmp") as file:
            fill(file)
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter for a file that it cannot write
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        guard.note("record", error)


def _private(path: str) -> IO[bytes]:
    return open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600))
