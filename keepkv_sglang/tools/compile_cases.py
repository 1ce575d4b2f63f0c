"""SGLang's Triton kernels with our score_mod, and without it for comparison, for kernels/compile_gate.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sglang.kernels.ops.attention import decode_attention, extend_attention

from keepkv_sglang.kernels.attention.triton_score_mod import VoteTable, requests_of_tokens, vote_score_mod

BATCH = 16


def cases(arch: int) -> dict[str, Callable[[], object]]:
    """bfloat16, head_dim 64 and 128, GQA 4 and MHA, with the tiles that SGLang chooses on that GPU."""
    found: dict[str, Callable[[], object]] = {}
    for votes in (False, True):
        kind = "votes" if votes else "plain"
        for dim in (64, 128):
            found[f"sglang decode {kind} D{dim}"] = partial(_decode, dim, 8, votes)
            found[f"sglang decode {kind} D{dim} MHA"] = partial(_decode, dim, 2, votes)
            found[f"sglang extend {kind} D{dim}"] = partial(_extend, arch, dim, votes)
    for dim in (64, 128):
        found[f"sglang extend votes, packed spans D{dim}"] = partial(_extend, arch, dim, True, lse=True)
    return found


def _pools(dim: int, heads: int, tokens: int) -> tuple[torch.Tensor, ...]:
    k, v = (torch.zeros(64, 2, dim, dtype=torch.bfloat16) for _ in range(2))
    q = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16)
    indptr = torch.zeros(BATCH + 1, dtype=torch.int32)
    return q, torch.empty_like(q), k, v, indptr, torch.zeros(64, dtype=torch.int64)


def _mod(votes: bool, *where: Any) -> dict[str, Any]:
    if not votes:
        return {}
    table = VoteTable([torch.zeros(64, 2)], 4)
    table.point(*where)
    return {"score_mod": vote_score_mod, "aux_tensors": table.aux(0)}


def _decode(dim: int, heads: int, votes: bool) -> None:
    q, out, k, v, indptr, indices = _pools(dim, heads, BATCH)
    logits, lse = torch.zeros(BATCH, heads, 8, dim), torch.zeros(BATCH, heads, 8)
    splits = torch.full((BATCH,), 8, dtype=torch.int32)
    mod = _mod(votes, indptr, indices)
    decode_attention.decode_attention_fwd(
        q, k, v, out, indptr, indices, logits, lse, splits, 8, 0.1, 1.0, 1.0, **mod
    )  # fmt: skip


def _extend(arch: int, dim: int, votes: bool, lse: bool = False) -> None:
    """lse: with its log-sum-exp, by which packed spans are joined."""
    q, out, k, v, indptr, indices = _pools(dim, 8, BATCH)
    starts = torch.arange(BATCH + 1)
    new = torch.zeros(BATCH, 2, dim, dtype=torch.bfloat16)
    mod = _mod(votes, indptr, indices, requests_of_tokens(starts, BATCH))
    with pretend(arch):
        extend_attention.extend_attention_fwd(
            q, new, new, out, k, v, starts, indptr, indices, None, True, None, 1, 1.0, 1.0, 0.1,
            lse_extend=torch.zeros(BATCH, 8) if lse else None, **mod,
        )  # fmt: skip


@contextmanager
def pretend(arch: int) -> Iterator[None]:
    """SGLang chooses the tiles of an extend by the GPU of the process; here by the one compiled for."""
    module = extend_attention
    before = {name: getattr(module, name, None) for name in ("_is_cuda", "_is_hip", "CUDA_CAPABILITY")}
    vars(module).update(_is_cuda=True, _is_hip=False, CUDA_CAPABILITY=divmod(arch, 10))
    try:
        yield
    finally:
        vars(module).update(before)
