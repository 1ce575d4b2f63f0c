"""Writes down what every compression chose, for tests that replay a server run in float64.

Off unless KEEPKV_RECORD names a folder. One file per compression, `<sequence>-<rid>.pt`
(`rank<r>-...` on tensor-parallel ranks above 0), a dict that torch.load reads.
It holds token positions and cluster numbers, no token ids and no text.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from keepkv_sglang.turn.spans import DueSpan
from keepkv_sglang.turn.state import RequestState

_sequence = itertools.count()


class Recorder:
    """Collects one compression: kept [layers, H, m], assign [layers, H, slots] and log votes lv [layers, m, H]. Where
    heads keep different numbers of tokens m is the largest, and what a head does not have is -1 and -inf."""

    def __init__(self, folder: str, facts: dict[str, Any]) -> None:
        # Tensor-parallel ranks record the same compression, each its own heads: rank 0 under the plain name.
        rank = f"rank{facts['rank']}-" if facts["rank"] else ""
        self.path = os.path.join(folder, f"{rank}{next(_sequence):05d}-{_in_file_name(facts['rid'])}.pt")
        self.facts = facts
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
        assign = torch.stack(self.assign)
        data = {
            "kept": pad_sequence(self.kept, True, -1),
            "lv": pad_sequence(self.lv, True, -math.inf),
            "assign": assign,
        }
        layers = self.facts["layers"]
        data = {name: x.view(layers, -1, x.shape[1]) for name, x in data.items()}
        torch.save({**data, "lv": data["lv"].transpose(1, 2), **self.facts}, self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path)


def _in_file_name(rid: str) -> str:
    """The beginning of a request id, which a client may choose, without what means something to a file system."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", rid[:16])


def begin(req: Any, state: RequestState, span: DueSpan, layers: int, rank: int) -> Recorder | None:
    """A recorder for this compression, or None when nothing is recorded. layers: that this process has. rank: of tensor
    parallelism."""
    folder = os.environ.get("KEEPKV_RECORD")
    if not folder:
        return None
    queries, policy = span.queries, span.policy
    return Recorder(
        folder,
        {
            "rid": str(req.rid),
            "rank": rank,
            "layers": layers,
            "start": span.start,
            "slots": span.slots,
            "tokens": span.tokens,
            "end": span.end,
            "m": span.m,
            "left": span.left,
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
