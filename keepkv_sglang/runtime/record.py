"""Writes down what every compression chose, for tests that replay a server run in float64.

Off unless KEEPKV_RECORD names a folder. One file per compression, `<sequence>-<rid>.pt`
(`rank<r>-...` on tensor-parallel ranks above 0), a dict that torch.load reads.
It holds token positions and cluster numbers, no token ids and no text. Only its owner may read it.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from typing import Any

import torch

from keepkv_sglang.turn.spans import DueSpan
from keepkv_sglang.turn.state import RequestState

_sequence = itertools.count()


class Recorder:
    """Collects one compression: kept [layers, H, m], assign [layers, H, slots] and log votes lv [layers, m, H]."""

    def __init__(self, folder: str, facts: dict[str, Any]) -> None:
        # Tensor-parallel ranks record the same compression, each its own heads: rank 0 under the plain name.
        rank = f"rank{facts['rank']}-" if facts["rank"] else ""
        self.path = os.path.join(folder, f"{rank}{next(_sequence):05d}-{_in_file_name(facts['rid'])}.pt")
        self.facts = facts
        self.kept: list[torch.Tensor] = []
        self.assign: list[torch.Tensor] = []
        self.lv: list[torch.Tensor] = []

    def layer(self, result: Any) -> None:
        self.kept.append(result.kept.cpu())
        self.assign.append(result.assign.cpu())
        self.lv.append(result.lv.cpu())

    def write(self) -> None:
        data = {name: torch.stack(getattr(self, name)) for name in ("kept", "assign", "lv")} | self.facts
        # A file that only its owner reads, under a name that nobody can take first.
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(self.path), suffix=".tmp", delete=False) as file:
            torch.save(data, file)
        os.replace(file.name, self.path)


def _in_file_name(rid: str) -> str:
    """The beginning of a request id, which a client may choose, without what means something to a file system."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", rid[:16])


def begin(req: Any, state: RequestState, span: DueSpan, rank: int) -> Recorder | None:
    """A recorder for this compression, or None when nothing is recorded. rank: of tensor parallelism."""
    folder = os.environ.get("KEEPKV_RECORD")
    if not folder:
        return None
    queries, policy = span.queries, span.policy
    return Recorder(
        folder,
        {
            "rid": str(req.rid),
            "rank": rank,
            "start": span.start,
            "slots": span.slots,
            "tokens": span.tokens,
            "end": span.end,
            "m": span.m,
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
