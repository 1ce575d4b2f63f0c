"""Vote-weighted attention over a paged KV pool: tensors in, tensors out, no SGLang.

    logit = (q . k) * scale + log_votes[slot, kv_head]        (Eq. 6 of arXiv 2504.09936)
    out = sum softmax(logit) v

`load()` returns an implementation with `name` and two functions; both write every element of `out` and
nothing else:

decode(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, scale, out)
    One query per request. seq_lens counts the KV slots of a request, the token being decoded included.
extend(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, extend_lens, scale, out, causal=True)
    The queries of request b are the last extend_lens[b] of its seq_lens[b] KV slots; query j sees the KV
    indices 0 .. seq_lens[b] - extend_lens[b] + j (causal) or all of them. K and V of the new tokens are
    already in the pool.

packed, in both: the packed spans of these requests (packed.py), whose slots are then in no row: every query sees the
cells of its head. cpp alone computes it here, the others raise ValueError; on a GPU triton_packed.py does,
beside SGLang's kernels.

Shapes: q, out [B or sum(extend_lens), Hq, D], float32 or bfloat16, one dtype; k_pool, v_pool [S, Hkv, D],
float32 or bfloat16, any stride(0), rows contiguous; log_votes [S, Hkv] float32, or None for plain attention
(zeros give the same bits); req_to_token [R, C] int32; rows, seq_lens, extend_lens [B] int64 (other integers
are converted); kv_head = q_head // (Hq / Hkv); head_dim a multiple of 8 up to 256. Computed in float32.

Differs from the equation: a seq_len of 0 (padding) gives zeros; a log vote of -inf or <= -1e29 masks its
entry (K and V of a masked entry must be finite, and V of one that a causal query does not see yet); a query with every
entry masked gets zeros, where Eq. 6 is 0/0. Other log votes must be finite. A NaN in q, or in K of an entry that a
query sees, makes the head's output NaN; one in V that component of it.

Errors: ValueError for shapes and dtypes outside this, IndexError for rows or slots outside the pool, MemoryError
without room for scratch (out is then unspecified).
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Protocol

import torch

from .packed import Packed

ORDER = ("cpp", "numba", "torch")
_log = logging.getLogger("keepkv")
_reported: set[str] = set()


class Attention(Protocol):
    """What load() returns; see this module's docstring."""

    name: str

    def decode(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        log_votes: torch.Tensor | None,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        packed: Packed | None = None,
    ) -> None: ...

    def extend(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        log_votes: torch.Tensor | None,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_lens: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        causal: bool = True,
        packed: Packed | None = None,
    ) -> None: ...


def load(name: str = "auto") -> Attention:
    """The CPU implementation called name, or the first of cpp, numba, torch that runs here ("auto").

    "auto" reads KEEPKV_CPU_KERNEL={auto,cpp,numba,torch}. Each fallback is logged once to the "keepkv"
    logger. The first load of cpp compiles (seconds). ValueError for an unknown name, RuntimeError when a
    forced one cannot run.
    """
    if name == "auto":
        name = os.environ.get("KEEPKV_CPU_KERNEL") or "auto"
    if name not in ("auto", *ORDER):
        raise ValueError(f"unknown CPU kernel {name!r}: choose auto, {', '.join(ORDER)} (KEEPKV_CPU_KERNEL)")
    if name != "auto":
        try:
            return _import(name)
        except (ImportError, RuntimeError, OSError) as error:
            raise RuntimeError(
                f"the CPU kernel {name!r} was asked for and cannot run: {error}. Repair that, or set "
                "KEEPKV_CPU_KERNEL=auto to use the fastest kernel that runs here"
            ) from error
    for candidate in ORDER[:-1]:
        try:
            return _import(candidate)
        except (ImportError, RuntimeError, OSError) as error:
            if candidate not in _reported:
                _reported.add(candidate)
                _log.warning("CPU attention kernel %s cannot run, trying the next: %s", candidate, error)
    return _import(ORDER[-1])


def _import(name: str) -> Attention:
    return importlib.import_module(f".{name}_impl", __name__)  # type: ignore[return-value]
