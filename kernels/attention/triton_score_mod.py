"""Votes on SGLang's own Triton kernels: a score_mod and the table that it reads.

SGLang's Triton decode and extend kernels take a function of the logits (RadixAttention.forward(score_mod=...,
aux_tensors=[A])) and hand it one 3-D tensor A, whose dtype nobody checks, and the logical position of each key. A
vote belongs to a slot, so A is an int64 table of device addresses, from which `vote_score_mod` finds the slot:

    logit += log_votes[kv_indices[kv_indptr[request] + kv_pos], kv_head]        (Eq. 6 of arXiv 2504.09936)

Why not the obvious ways, measured by compiling (docs/kernels.md): a load per logit needs 1304 bytes of stack, a dense
bias [tokens, heads, keys] 296 bytes and a great deal of memory; one load per key needs none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# SGLang's decode computes exp(-inf - -inf) = NaN for a block of masked keys; this is masked all the same in float32.
FINITE_MASK = tl.constexpr(-1e30)
_FIELDS = 8
_VOTES, _INDPTR, _INDICES, _REQUESTS, _STRIDE, _GROUP = range(6)


@triton.jit
def _first(x):
    """The element of row 0: x is a scalar, or a column whose smallest element that is."""
    return tl.min(x + tl.zeros([1, 1], tl.int32))


@triton.jit
def vote_score_mod(qk, q_pos, kv_pos, q_idx, head, mask, Aux0, aux0_stride_t, aux0_stride_h, aux0_len):
    """Adds log votes to a tile of logits. SGLang calls it inside its kernels; q_pos, mask and aux0_* are unused.

    One program of SGLang's kernels works on one request and one kv head, so everything but kv_pos is the same for the
    whole tile: one index and one vote per key. kv_pos beyond the table's keys (new tokens of an extend, padding)
    carries vote 1, and nothing is read for it.
    """
    votes = tl.load(Aux0 + 0).to(tl.pointer_type(tl.float32))
    indptr = tl.load(Aux0 + 1).to(tl.pointer_type(tl.int32))
    indices = tl.load(Aux0 + 2).to(tl.pointer_type(tl.int64))
    requests = tl.load(Aux0 + 3)
    stride = tl.load(Aux0 + 4)
    group = tl.load(Aux0 + 5).to(tl.int32)
    request = _first(q_idx).to(tl.int32)
    if requests != 0:
        request = tl.load(requests.to(tl.pointer_type(tl.int32)) + request)
    start = tl.load(indptr + request)
    known = kv_pos < tl.load(indptr + request + 1) - start
    slot = tl.load(indices + start + kv_pos, mask=known, other=0)
    vote = tl.load(votes + slot * stride + _first(head).to(tl.int32) // group, mask=known, other=0.0)
    return qk + tl.maximum(vote, FINITE_MASK)


class VoteTable:
    """The int64 table of one server, one row per layer, at an address that never changes.

    rows [layers, 1, 1, 8] int64: addresses of log_votes, kv_indptr, kv_indices and the request of each query token
    (0: query i belongs to request i, as in decode); slot stride of log_votes; q heads per kv head; two unused. A CUDA
    graph records the address of a row, so a table that graphs use is made before the first capture and afterwards only
    written in place. Contents are written by fill kernels: no synchronisation, no host buffer that must outlive them.

    The table holds addresses, not references: what they point to must live until the kernels have run. `point` keeps
    the last tensors it was given, which is enough on one stream.
    """

    def __init__(self, log_votes: list[torch.Tensor], group: int) -> None:
        """log_votes: per layer float32 [slots, kv_heads], rows contiguous, which must not be reallocated.

        ValueError for another dtype or layout.
        """
        for votes in log_votes:
            if votes.dtype != torch.float32 or votes.dim() != 2 or votes.stride(1) != 1:
                raise ValueError(f"log_votes must be float32 [slots, kv_heads], got {votes.dtype} {tuple(votes.shape)}")
        rows = torch.zeros(len(log_votes), 1, 1, _FIELDS, dtype=torch.int64)
        for row, votes in zip(rows.view(-1, _FIELDS), log_votes, strict=True):
            row[_VOTES], row[_STRIDE], row[_GROUP] = votes.data_ptr(), votes.stride(0), group
        self.rows = rows.to(log_votes[0].device)
        self._alive: tuple[object, ...] = (log_votes,)
        self._votes = log_votes

    def point(self, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, requests: torch.Tensor | None = None) -> None:
        """Sets what the next kernels read. kv_indptr int32 [B + 1], kv_indices int64: the slots of request b are
        kv_indices[kv_indptr[b] : kv_indptr[b + 1]]; requests int32 [tokens] for an extend, None for a decode.

        Writes the table in place. ValueError for other dtypes, which the kernel could not tell.
        """
        wanted = [(kv_indptr, torch.int32), (kv_indices, torch.int64)]
        if requests is not None:
            wanted.append((requests, torch.int32))
        for tensor, dtype in wanted:
            if tensor.dtype != dtype or tensor.dim() != 1 or (tensor.numel() > 1 and tensor.stride(0) != 1):
                raise ValueError(f"the vote table needs a contiguous {dtype} vector, got {tensor.dtype}")
        self._alive = (self._votes, kv_indptr, kv_indices, requests)
        fields = self.rows.view(-1, _FIELDS)
        fields[:, _INDPTR].fill_(kv_indptr.data_ptr())
        fields[:, _INDICES].fill_(kv_indices.data_ptr())
        fields[:, _REQUESTS].fill_(0 if requests is None else requests.data_ptr())

    def aux(self, layer: int) -> list[torch.Tensor]:
        """aux_tensors for SGLang: [1, 1, 8] int64 of one layer. Slicing it by tokens, as SGLang does for padded
        batches, leaves the address alone."""
        return [self.rows[layer]]


def requests_of_tokens(qo_indptr: torch.Tensor, tokens: int) -> torch.Tensor:
    """int32 [tokens]: the request of each query token; qo_indptr [B + 1]. Padding behind the last request counts as
    the last. No synchronisation."""
    at = torch.arange(tokens, device=qo_indptr.device, dtype=qo_indptr.dtype)
    found = torch.searchsorted(qo_indptr[1:].contiguous(), at, right=True, out_int32=True)
    return found.clamp_(max=max(0, qo_indptr.numel() - 2))
