"""Packed spans beside ordinary ones on a GPU: decode, extend, what a step adds, and a compression.

    python -m benchmarks.gpu.packed [--quick]

One layer of a Llama-3-8B (cases.py) of LAYERS; rows of RAW ordinary slots around packed spans, whose heads have between
a fifth and twice the mean of their cells. Beside them rows of as many slots, none packed: the heads' mean. Decode: CUDA
graphs, median; SGLang's kernel, then ours. Each row's first request is compared with float32. Compression: a turn of
2,000 tokens in 32 layers, by every --keepkv-heads; waits and operations as turns.py counts them. Exit status 1 when an
output is wrong. Needs SGLang's kernels: 77 without them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import turns
from benchmarks.gpu.bench import CALLS, captured, differs, seconds
from benchmarks.gpu.cases import DIM, DTYPE, HEADS, HEADS_KV, Batch, missing
from keepkv_sglang.compress.batch import Rows, Storage, compress_rows
from keepkv_sglang.compress.packed import compress_packed, shares_cells
from keepkv_sglang.compress.select import SpanPolicy, left_raw
from keepkv_sglang.kernels.attention import triton_packed
from keepkv_sglang.kernels.attention.packed import Layers, Packed
from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, requests_of_tokens, vote_score_mod

LAYERS, RAW, SKIPPED = 4, 128, 77
CASES = ((1, 2048, 1), (1, 2048, 16), (8, 2048, 16), (32, 2048, 1), (32, 2048, 16))  # requests, slots, spans in a row
EXTENDS = ((2048, 128), (2048, 1024), (6554, 2048))  # slots before, new tokens
SPLITS = 16


class PackedBatch:
    """`batch` rows of `slots` slots: half of RAW, `spans` packed spans, the rest of RAW and `new` further ones."""

    def __init__(
        self,
        batch: int,
        slots: int,
        spans: int,
        new: int = 0,
        device: str = "cuda",
        heads: int = HEADS_KV,
        raw: int = RAW,
    ) -> None:
        width, total = slots + new, batch * (slots + new)
        self.layers = Layers(
            *([torch.randn(total, heads, DIM, device=device, dtype=DTYPE) for _ in range(LAYERS)] for _ in range(2)),
            [torch.rand(total, heads, device=device) for _ in range(LAYERS)],
        )
        self.table = torch.randperm(total, device=device).int().view(batch, width)
        self.rows, self.device, self.new, self.scale = torch.arange(batch, device=device), device, new, DIM**-0.5
        self.lens = torch.full((batch,), slots, device=device)
        m = (slots - raw) // spans
        self.begins = [raw // 2 + m * span for span in range(spans)]
        numbers = torch.arange(1, batch * spans + 1, device=device, dtype=torch.int32).view(batch, spans)
        self.span_of = torch.zeros(total, device=device, dtype=torch.int32)
        packed = self.table[:, raw // 2 : raw // 2 + m * spans].long()
        self.span_of[packed] = numbers.repeat_interleave(m, dim=1)
        share = torch.linspace(0.2, 1.8, LAYERS * heads).roll(3)
        ends = (share.cumsum(0) * m).round().long()
        ends[-1] = m * LAYERS * heads
        self.m, self.start = m, torch.cat([ends.new_zeros(1), ends])
        self.starts = self.start.expand(batch * spans + 1, -1).contiguous().to(device)
        address = torch.tensor([self.starts.data_ptr()], device=device)
        self.cells = triton_packed.CellTable(self.layers, self.span_of, address)
        group = HEADS // HEADS_KV
        self.votes = [VoteTable([votes], group) for votes in self.layers.log_votes]
        self.q = torch.randn(batch * (new or 1), heads * group, DIM, device=device, dtype=DTYPE)
        self.out = torch.empty_like(self.q)
        self.indptr, self.first = (torch.zeros(batch + 1, dtype=torch.int32, device=device) for _ in range(2))
        self.indices = torch.empty(batch * slots, dtype=torch.int64, device=device)

    def cut(self) -> triton_packed.CutRows:
        """What a step adds, whatever the number of layers."""
        where = (self.table, self.rows, self.lens, self.indptr, self.indices, self.first)
        return triton_packed.cut(self.cells, *where, keep_last=not self.new)

    def decode(self, layer: int = 1) -> Callable[[], None]:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd  # may be missing

        found, shape = self.cut(), (*self.q.shape[:2], SPLITS)
        part = torch.empty(*shape, DIM, device=self.device)
        lse = torch.full(shape, float("-inf"), device=self.device)
        splits = torch.full((len(self.rows),), SPLITS, dtype=torch.int32, device=self.device)
        self.votes[layer].point(found.indptr, found.indices)
        mod = {"score_mod": vote_score_mod, "aux_tensors": self.votes[layer].aux(0)}
        pools = self.layers.keys[layer], self.layers.values[layer]
        where = (found.indptr, found.indices, part, lse, splits, SPLITS, self.scale, 1.0, 1.0)

        def call() -> None:
            decode_attention_fwd(self.q, *pools, self.out, *where, **mod)
            triton_packed.decode(self.q, found, layer, self.scale, part, lse, self.out)

        return call

    def extend(self, layer: int = 1) -> Callable[[], None]:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd  # may be missing

        found, batch, tokens = self.cut(), len(self.rows), len(self.q)
        queries = torch.arange(batch + 1, device=self.device) * self.new
        self.votes[layer].point(found.indptr, found.indices, requests_of_tokens(queries, tokens))
        mod = {"score_mod": vote_score_mod, "aux_tensors": self.votes[layer].aux(0)}
        pools, fresh = (self.layers.keys[layer], self.layers.values[layer]), self.table[:, -self.new :].flatten().long()
        k, v = (pool[fresh] for pool in pools)
        lse = torch.empty(self.q.shape[:2], device=self.device)
        where = (queries, found.indptr, found.indices, None, True, None, self.new, 1.0, 1.0, self.scale)

        def call() -> None:
            extend_attention_fwd(self.q, k, v, self.out, *pools, *where, lse_extend=lse, **mod)
            triton_packed.extend(self.q, found, layer, self.scale, queries, lse, self.out)

        return call

    def first_row(self) -> Packed:
        """The packed spans of the first request."""
        spans = len(self.begins)
        slots = torch.cat([self.table[0, begin : begin + self.m] for begin in self.begins])
        at = torch.arange(spans + 1) * self.m
        return Packed(self.layers, torch.tensor([0, spans]), at, slots, self.start.expand(spans, -1).contiguous())

    def exact(self, layer: int = 1) -> torch.Tensor:
        """[q heads, D] of the first query of the first request, in float32 by torch: its row's slots in no span, the
        cells of its head and, of an extend, its own token."""
        row, heads = self.table[0].long(), self.layers.heads
        raw = row[: int(self.lens[0]) + bool(self.new)]
        raw = raw[(self.span_of[raw] == 0)]
        found = []
        for head in range(heads):
            run = layer * heads + head
            f = torch.arange(int(self.start[run]), int(self.start[run + 1]), device=self.device)
            where, at, other = f // (self.m * heads), f % (self.m * heads) // heads, f % heads
            slots = torch.cat([row[begin + at] for begin in self.begins])
            which, other = where.repeat(len(self.begins)), other.repeat(len(self.begins))
            k, v, lv = (
                torch.cat([torch.stack(list(pool))[which, slots, other], pool[layer][raw, head]]).float()
                for pool in (self.layers.keys, self.layers.values, self.layers.log_votes)
            )
            if self.new:
                lv[-1] = 0.0  # the token's own, which no vote weights
            q = self.q[0].view(heads, -1, DIM)[head].float()
            found.append((q @ k.T * self.scale + lv).softmax(1) @ v)
        return torch.cat(found)


def decodes(cases: Any) -> list[str]:
    wrong = []
    for batch, slots, spans in cases:
        ordinary, case = Batch(batch, slots), PackedBatch(batch, slots, spans)
        times = []
        for call, out in ((ordinary.sglang(True), ordinary.out), (case.decode(), case.out)):
            call()
            replay = captured(call, out)
            times.append(1e6 * (seconds(replay.call, CALLS) if replay.call else seconds(call)))
            wrong += [f"decode {batch} x {slots}: {replay.why}"] if replay.wrong else []
        step = 1e6 * seconds(lambda case=case: case.cut())
        error, bad = differs(case.out[:1], case.exact()[None])
        wrong += [f"decode {batch} x {slots}, {spans} spans: off by {error:.3g}"] if bad else []
        print(
            f"decode {batch:3} x {slots}, {spans:2} spans: ordinary {times[0]:.1f} us, packed {times[1]:.1f} us "
            f"({times[1] / times[0]:.2f}); a step's cut {step:.1f} us; off by {error:.4f}", flush=True,
        )  # fmt: skip
    return wrong


def extends(cases: Any) -> list[str]:
    wrong = []
    for before, new in cases:
        case, ordinary = PackedBatch(1, before, 4, new), Batch(1, before + new).sglang_extend(new)
        call = case.extend()
        call()
        error, bad = differs(case.out[:1], case.exact()[None])
        wrong += [f"extend {before} + {new}: off by {error:.3g}"] if bad else []
        plain, packed = 1e6 * seconds(ordinary), 1e6 * seconds(call)
        print(
            f"extend {before} + {new}: ordinary {plain:.0f} us, packed {packed:.0f} us ({packed / plain:.2f})",
            flush=True,
        )
    return wrong


def compressions(tokens: int = 2000) -> None:
    kept, layers = tokens // 10, turns.LAYERS
    total = tokens + kept
    k, v = ([torch.randn(total, HEADS_KV, DIM, device="cuda", dtype=DTYPE) for _ in range(layers)] for _ in range(2))
    for layer, keys in enumerate(k):  # heads that look more or less sharply
        keys *= torch.linspace(0.5, 1.5 + layer / layers, HEADS_KV, device="cuda")[:, None]
    storage = Storage(k, v, [torch.zeros(total, HEADS_KV, device="cuda") for _ in k], [DIM**-0.5] * layers)
    empty, span, target = torch.randperm(total, device="cuda").split([0, tokens, kept])
    q = torch.randn(turns.WINDOW + turns.REFERENCES, HEADS, DIM, device="cuda", dtype=DTYPE)
    window = torch.arange(tokens - turns.WINDOW, tokens)
    index = torch.cat([torch.full((turns.REFERENCES,), tokens), window])
    for heads in ("uniform", "layer", "all"):
        policy = SpanPolicy(kept, "attention_matching", 64, 4, 0.85, scorer="window_references", heads=heads)
        shared = (storage, Rows(empty, span, target), lambda _: q, HEADS, index, policy)
        left = left_raw(policy, tokens)

        def call(shared: Any = shared, left: int = left) -> None:
            if shares_cells(shared[-1], left):
                results = compress_packed(*shared, left, turns.VARIANTS[0][1] << 20, lambda *_: None)
            else:
                results = compress_rows(*shared, turns.VARIANTS[0][1] << 20)
            for _ in results:
                pass

        first = turns.once(call)
        later = statistics.median(turns.once(call) for _ in range(3))
        waits = turns.syncs(call)
        with turns.Count() as count:
            call()
        print(
            f"compression of {tokens} to {kept}, heads {heads}: first {first:.2f} s, then {1e3 * later:.0f} ms; "
            f"{waits} waits, {count.count} operations", flush=True,
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case of each")
    quick = parser.parse_args().quick
    try:
        wrong = decodes(CASES[:1] if quick else CASES) + extends(EXTENDS[:1] if quick else EXTENDS)
    except ModuleNotFoundError as error:
        if not missing(error):
            raise
        print(f"without SGLang's kernels: {error}")
        return SKIPPED
    compressions(500 if quick else 2000)
    for line in wrong:
        print("WRONG", line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
