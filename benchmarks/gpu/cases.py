"""What bench.py runs: one batch of decode requests for three kernels, and every Triton kernel on a small case.

One layer of a Llama-3-8B: 32 query heads, 8 kv heads, head_dim 128, bfloat16, page size 1, slots scattered at random.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from keepkv_sglang.kernels.attention import triton_impl, triton_packed

HEADS, HEADS_KV, DIM, DTYPE = 32, 8, 128, torch.bfloat16
SLOT_BYTES = 2 * HEADS_KV * DIM * 2  # K and V of a slot
KERNELS = ("ours", "sglang", "flashinfer")
OPTIONAL = ("sglang", "flashinfer")


def missing(error: BaseException) -> bool:
    """Whether one of OPTIONAL is not installed. Any other failed import, of a part of one that is installed or of what
    one needs, is an error: a skip would hide it."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return False
    package = error.name.partition(".")[0]
    return package in OPTIONAL and importlib.util.find_spec(package) is None


class Batch:
    """Scattered slots for `batch` requests of `slots` slots each, and a contract's arguments."""

    def __init__(self, batch: int, slots: int, device: str = "cuda") -> None:
        total = batch * slots
        self.k, self.v = (torch.randn(total, HEADS_KV, DIM, device=device, dtype=DTYPE) for _ in range(2))
        self.votes = torch.rand(total, HEADS_KV, device=device)
        self.table = torch.randperm(total, device=device).int().view(batch, slots)
        self.rows = torch.arange(batch, device=device)
        self.lens = torch.full((batch,), slots, device=device)
        self.q = torch.randn(batch, HEADS, DIM, device=device, dtype=DTYPE)
        self.out = torch.empty_like(self.q)
        self.indptr = (torch.arange(batch + 1, device=device) * slots).int()
        self.indices = self.table.flatten().long()
        self.scale = DIM**-0.5
        self.device = device

    def exact(self, request: int, votes: bool, chunk: int = 8192) -> torch.Tensor:
        """[q heads, D] of one request in float32 by torch, `chunk` slots at a time: K in float32 is twice the pool."""
        parts = self.table[request].long().split(chunk)
        q = self.q[request].float().view(HEADS_KV, HEADS // HEADS_KV, DIM) * self.scale
        logits = torch.cat([torch.einsum("hgd,nhd->hgn", q, self.k[slots].float()) for slots in parts], 2)
        if votes:
            logits += self.votes[self.table[request].long()].T[:, None]
        weights = logits.softmax(2).split(chunk, 2)
        out = torch.zeros_like(q)
        for weight, slots in zip(weights, parts, strict=True):
            out += torch.einsum("hgn,nhd->hgd", weight, self.v[slots].float())
        return out.reshape(HEADS, DIM)

    def call(self, kernel: str, votes: bool) -> Callable[[], None]:
        """A decode into `out` by one of KERNELS. ModuleNotFoundError where its package is not there."""
        return {"ours": self.ours, "sglang": self.sglang, "flashinfer": self.flashinfer}[kernel](votes)

    def ours(self, votes: bool) -> Callable[[], None]:
        log_votes = self.votes if votes else None
        return lambda: triton_impl.decode(
            self.q, self.k, self.v, log_votes, self.table, self.rows, self.lens, self.scale, self.out
        )

    def sglang(self, votes: bool) -> Callable[[], None]:
        """SGLang's Triton decode."""
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

        splits = 16
        shape = (*self.q.shape[:2], splits)
        part = torch.empty(*shape, DIM, device=self.device)
        lse = torch.empty(shape, device=self.device)
        count = torch.full((len(self.lens),), splits, dtype=torch.int32, device=self.device)
        mod = self._mod(self.indptr, self.indices) if votes else {}
        arguments = (self.indptr, self.indices, part, lse, count, splits, self.scale, 1.0, 1.0)
        return lambda: decode_attention_fwd(self.q, self.k, self.v, self.out, *arguments, **mod)

    def sglang_extend(self, new: int, votes: bool = True) -> Callable[[], None]:
        """SGLang's Triton extend: the last `new` slots of every request are new tokens."""
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

        from keepkv_sglang.kernels.attention.triton_score_mod import requests_of_tokens

        batch, slots = self.table.shape
        prefix = self.table[:, : slots - new].flatten().long()
        indptr = (torch.arange(batch + 1, device=self.device) * (slots - new)).int()
        starts = torch.arange(batch + 1, device=self.device) * new
        fresh = self.table[:, slots - new :].flatten().long()
        q = torch.randn(batch * new, HEADS, DIM, device=self.device, dtype=DTYPE)
        mod = self._mod(indptr, prefix, requests_of_tokens(starts, len(q))) if votes else {}
        arguments = (self.k, self.v, starts, indptr, prefix, None, True, None, new, 1.0, 1.0, self.scale)
        k, v, out = self.k[fresh], self.v[fresh], torch.empty_like(q)
        return lambda: extend_attention_fwd(q, k, v, out, *arguments, **mod)

    def _mod(self, *where: torch.Tensor) -> dict[str, Any]:
        from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, vote_score_mod

        table = VoteTable([self.votes], HEADS // HEADS_KV)
        table.point(*where)
        self._table = table  # it holds addresses: what they point to lives as long as this batch
        return {"score_mod": vote_score_mod, "aux_tensors": table.aux(0)}

    def flashinfer(self, votes: bool) -> Callable[[], None]:
        """FlashInfer's decode as SGLang's backend has it at this group of 4: on tensor cores."""
        wrapper = _wrapper(votes)
        last = torch.ones(len(self.lens), dtype=torch.int32, device=self.device)
        kind = {"q_data_type": DTYPE, "kv_data_type": DTYPE}
        wrapper.plan(self.indptr, self.indices.int(), last, HEADS, HEADS_KV, DIM, 1, **kind)
        cache = (self.k[:, None], self.v[:, None])
        extra = (self.votes, self.scale) if votes else ()
        return lambda: wrapper.run(self.q, cache, *extra, out=self.out)


@functools.cache
def _wrapper(votes: bool) -> Any:
    """One for all cases: with jit_args, making one generates the module's sources and asks ninja each time."""
    import flashinfer

    from keepkv_sglang.kernels.attention.flashinfer_variants import prefill_args

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    jit = {"jit_args": prefill_args(DTYPE, DIM)} if votes else {}
    # fa2 by name: "auto" may choose cuDNN, which has no votes and is not what SGLang runs.
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2", use_tensor_cores=True, **jit)


def small(device: str = "cuda") -> None:
    """Every Triton kernel of ours, and SGLang's with our score_mod where it is installed, on a few hundred keys: for
    compute-sanitizer, which is a hundred times slower."""
    from benchmarks.gpu.packed import PackedBatch  # which imports this file
    from keepkv_sglang.kernels.merge import triton_impl as merge
    from keepkv_sglang.kernels.merge.torch_impl import Segments
    from keepkv_sglang.kernels.score import triton_impl as score

    batch = Batch(2, 130, device)
    batch.ours(True)()
    new = torch.tensor([3, 130], device=device)
    q = torch.randn(133, HEADS, DIM, device=device, dtype=DTYPE)
    out = torch.empty_like(q)
    shared = (q, batch.k, batch.v, batch.votes, batch.table, batch.rows, batch.lens, new, batch.scale, out)
    triton_impl.extend(*shared)
    k = torch.randn(2, 130, DIM, device=device)
    queries, position = torch.randn(2, 32, DIM, device=device), torch.arange(98, 130, device=device)
    lv, weights = torch.zeros(130, 2, device=device), torch.ones(2, 32, device=device)
    for dtype in (torch.float32, DTYPE):
        keys = k.transpose(0, 1).to(dtype)
        score.window_sums(queries, position, keys[:50], lv[:50], keys, keys, lv, weights, True)
    order = torch.randperm(130, device=device).expand(2, -1).contiguous()
    merge.nearest_kept(k, order[:, :100].contiguous(), order[:, 100:].contiguous(), order[:, 100:] % 2 == 0)
    seg = Segments.from_assignment(torch.arange(130, device=device).expand(2, -1) % 20, 20)
    merge.merge_segments(k, k, lv.T.contiguous(), torch.zeros(260, device=device), seg)
    for pool in (batch.k, batch.votes):
        merge.gather_slots(pool, order[0, :50], pool.new_empty(pool.shape[1], 50, *pool.shape[2:]))
    try:
        batch.sglang(True)()
        batch.sglang_extend(9)()
        packed_case = PackedBatch(2, 60, 3, device=device, raw=12)
        packed_case.decode()()
        PackedBatch(2, 60, 3, new=9, device=device, raw=12).extend()()
        first = packed_case.first_row()
        triton_packed.gather_cells(first, [0, 1], first.longest([0, 1]))
        print("small: SGLang's kernels with votes ran")
    except ImportError as error:
        if not missing(error):
            raise
        print(f"small: without SGLang's kernels: {error}")
    if device == "cuda":
        torch.cuda.synchronize()
    print("small: every kernel of ours ran")
