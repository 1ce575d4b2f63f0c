"""Memory beside the KV pool, per token, per request and per cached span: formulas, and what they give when measured.

    python benchmarks/memory.py            the demo model's shape, measured; Llama-3-70B on 8 GPUs, from the formulas

docs/scaling.md uses the formulas; tests/tools/test_memory.py holds them against tensors and tracemalloc. No model runs.
"""

from __future__ import annotations

import gc
import math
import random
import sys
import tracemalloc
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from keepkv_sglang.memory.arena import ARENA_MAX_BYTES, QueryArena
from keepkv_sglang.memory.calibration import QUERIES
from keepkv_sglang.memory.cells import FIRST_ROOM, PackedCells
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.radix.tree import SpanTree
from keepkv_sglang.runtime.attach import arena_most, arena_rows
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.report import tables
from keepkv_sglang.turn.state import Planned, QueryRows, RequestState


@dataclass(frozen=True)
class Shape:
    """A model on one tensor-parallel rank. kv_heads, q_heads: of the rank; itemsize: bytes per number of K, V, Q."""

    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    itemsize: int = 2

    @property
    def kv(self) -> int:
        """Bytes of K and V per slot."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    @property
    def votes(self) -> int:
        """Bytes of log votes per slot: float32."""
        return 4 * self.layers * self.kv_heads

    @property
    def packed(self) -> int:
        """Bytes of one packed span beside its slots: where the run of each head begins, int64."""
        return 8 * (self.layers * self.kv_heads + 1)

    @property
    def query(self) -> int:
        """Bytes of one token's queries in the arena."""
        return self.layers * self.q_heads * self.head_dim * self.itemsize

    def arena_rows(self, config: KeepKVConfig, on_gpu: int = 0) -> int:
        """Rows of the query arena, whole turns (runtime/attach.py). One row more belongs to nobody. on_gpu: bytes that
        pool and arena have together; 0: it is a CPU's."""
        most = arena_most(on_gpu, on_gpu=True) if on_gpu else ARENA_MAX_BYTES
        return arena_rows(config, True, 0, most // self.query - 1)

    def calibration(self) -> int:
        """Bytes of the fixed text's queries, whatever the pool's size."""
        return QUERIES * self.query

    def observed(self, tokens: int, queries: int) -> int:
        """Bytes of what one kv head's scores take at once, before they are cut into blocks of SCRATCH_BYTES: two
        float32 [tokens, queries x q heads per kv head]."""
        return 2 * 4 * tokens * queries * self.q_heads // self.kv_heads


DEMO = Shape(layers=30, kv_heads=3, q_heads=9, head_dim=64, itemsize=4)
LLAMA_70B_TP8 = Shape(layers=80, kv_heads=1, q_heads=8, head_dim=128)

# An example, chosen like the coding agents of ../shared/data/agent_traces (docs/scaling.md).
KV_GIB, SHARED, OWN, REPLY = 48, 13_000, 87_000, 400

# Host memory of the prefix cache, CPython 3.11, 64 bit.
SPAN_BYTES = 2600  # objects, dicts and index of one span without its tokens and slots, at most


def span_host_bytes(tokens: int, slots: int) -> int:
    """Most host bytes of one cached span: 8 per token id, with the marks of protect and fair in the same 8; 8 per slot
    number; and what does not depend on its size."""
    return 8 * tokens + 8 * slots + SPAN_BYTES


def request_host_bytes(config: KeepKVConfig) -> int:
    """Most host bytes of one running request: state, plan, and two lists of its window and reference rows."""
    return 2000 + 2 * (8 + 32) * (config.window + config.references)


def concurrency(pool: int, shared: int, own: int, reply: int, budget: float) -> float:
    """Requests that decode at once in a pool of slots: a prefix of `shared` tokens that all have, uncompressed and
    once; `own` tokens each, ceil(budget own) slots; of a reply its budget and at most one interval of raw tail. At
    budget 1 the reply is raw altogether."""
    tail = reply if budget == 1 else math.ceil(budget * reply) + min(KeepKVConfig().interval, reply)
    return (pool - shared) / (math.ceil(budget * own) + tail)


def measured(make: Callable[[], Any]) -> int:
    """Host bytes that stay allocated for what `make` returns."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = make()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return after - before


def spans(count: int, tokens: int, slots: int) -> SpanTree:
    """A tree of unrelated conversations, two spans each, as the server's adapter fills it: slots as int64 tensors.

    Torch's own memory is not Python's: the tensors' data, 8 bytes per slot, does not show up in tracemalloc.
    """
    rng = random.Random(0)
    tree = SpanTree()
    for _ in range(count // 2):
        parent = None
        for _ in range(2):
            parent, _new = tree.insert(
                parent=parent, anchor=None, anchor_len=0, namespace=("a",),
                tokens=array("q", [rng.randrange(1 << 30) for _ in range(tokens)]),
                slots=torch.zeros(slots, dtype=torch.int64), m=slots,
            )  # fmt: skip
    return tree


def requests(count: int, config: KeepKVConfig) -> list[RequestState]:
    """Requests in the middle of their prefill: one planned span with its window and references."""
    made = []
    for number in range(count):
        state = RequestState(replace(config), (None, None, None, config.fingerprint()), 10_000)
        rows = config.window + config.references
        base = 1000 + number * rows
        queries = QueryRows(list(range(base, base + rows)), list(range(base, base + rows)), config.references)
        state.plan.append(Planned(9_999, 0, True, queries))
        made.append(state)
    return made


def rows() -> list[tuple[str, float, float]]:
    """(what, formula, measured) in bytes for the demo model's shape in float32."""
    shape, config = DEMO, KeepKVConfig(enabled=True)
    slots, count, n, m = 1000, 400, 1000, 100
    votes = VoteStore(shape.layers, slots, shape.kv_heads, "cpu")
    keys = [torch.zeros(slots, shape.kv_heads, shape.head_dim)] * shape.layers
    cells = PackedCells.of(keys, keys, votes.log_votes)
    arena = QueryArena(shape.layers, 288, shape.q_heads, shape.head_dim, torch.float32, "cpu")
    short = measured(lambda: spans(count, 64, 7)) / count
    long = measured(lambda: spans(count, n, m)) / count
    request = measured(lambda: requests(200, config)) / 200
    return [
        ("votes per slot", shape.votes, votes.nbytes / slots),
        *(
            [
                ("which slots are packed, per slot", 4, cells.span_of.nbytes / slots),
                ("one packed span", shape.packed, (cells.nbytes - cells.span_of.nbytes) / FIRST_ROOM),
            ]
            if cells is not None  # the C++ kernels run here
            else []
        ),
        ("queries per arena row", shape.query, arena.nbytes / arena.queries.shape[1]),
        ("host, per further token of a cached span", 8, (long - short) / (n - 64)),
        ("host, one span of 1,000 tokens (at most; slots aside)", span_host_bytes(n, 0), long),
        ("host, one span of 64 tokens (at most; slots aside)", span_host_bytes(64, 0), short),
        ("host, one running request (at most)", request_host_bytes(config), request),
    ]


def main() -> int:
    both = [(what, f"{formula:,.0f}", f"{found:,.0f}") for what, formula, found in rows()]
    print(tables.markdown(("what", "formula, bytes", "measured, bytes"), both))
    shape, config = LLAMA_70B_TP8, KeepKVConfig(enabled=True)
    queries = config.window + config.references
    print("\nLlama-3-70B, bfloat16, one of 8 tensor-parallel ranks, from the formulas:\n")
    sizes = (
        ("K and V per slot", shape.kv),
        ("votes per slot", shape.votes),
        ("queries of one token", shape.query),
        (f"queries of one prompt ({queries} rows)", queries * shape.query),
        ("arena", (shape.arena_rows(config, KV_GIB << 30) + 1) * shape.query),
        ("prompts whose queries the arena holds", shape.arena_rows(config, KV_GIB << 30) // queries),
        ("calibration", shape.calibration()),
    )
    print(tables.markdown(("what", "bytes"), [(what, f"{size:,}") for what, size in sizes]))
    print(f"\nAgents that decode at once: {KV_GIB} GiB per GPU for the pool, {SHARED:,} shared tokens,")
    print(f"{OWN:,} of their own, replies of {REPLY}\n")
    agents = []
    for budget in (1.0, 0.2, 0.1):
        pool = (KV_GIB << 30) // (shape.kv + (shape.votes if budget < 1 else 0))
        agents.append((f"{budget:g}", f"{pool:,}", f"{concurrency(pool, SHARED, OWN, REPLY, budget):.1f}"))
    print(tables.markdown(("budget", "slots", "agents"), agents, text=()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
