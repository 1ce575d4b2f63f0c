"""What every implementation demands of its arguments, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .packed import Packed

# A log vote at or below this masks its entry: weight exactly 0, as for -inf. Triton needs the finite form.
MASKED = -1e29

STORAGE_DTYPES = (torch.float32, torch.bfloat16)
GPU_STORAGE_DTYPES = (*STORAGE_DTYPES, torch.float16)
Lengths = torch.Tensor | Sequence[int]


def refuse_packed(packed: Packed | None) -> None:
    """ValueError where an implementation that reads slots alone is given packed spans."""
    if packed is not None:
        raise ValueError("this kernel reads no packed spans: use KEEPKV_CPU_KERNEL=cpp, or heads uniform")


def as_int64(values: Lengths, name: str, size: int) -> torch.Tensor:
    """A contiguous int64 CPU tensor [size]. ValueError when the length differs."""
    if not isinstance(values, torch.Tensor) or values.dtype != torch.int64 or not values.is_contiguous():
        values = torch.as_tensor(values, dtype=torch.int64).contiguous()
    if not values.is_cpu:
        values = values.cpu()
    if values.numel() != size:
        raise ValueError(f"{name} has {values.numel()} entries, expected {size} (one per request)")
    return values


def packed_rows(x: torch.Tensor) -> bool:
    """True when everything but dim 0 is contiguous."""
    stride = x.stride()
    return stride[-1] == 1 and (len(stride) < 3 or stride[1] == x.shape[2])


def check(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    log_votes: torch.Tensor | None,
    req_to_token: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Returns q with packed rows. ValueError, with what to do next, for tensors outside the CPU kernels' contract."""
    if not (q.is_cpu and k_pool.is_cpu and v_pool.is_cpu and req_to_token.is_cpu and out.is_cpu) or (
        log_votes is not None and not log_votes.is_cpu
    ):
        given = {str(x.device) for x in (q, k_pool, v_pool, log_votes, req_to_token, out) if x is not None}
        raise ValueError(f"the CPU kernels got tensors on {', '.join(sorted(given))}: pass CPU tensors")
    check_layout(q, k_pool, v_pool, log_votes, req_to_token, out)
    return q if packed_rows(q) else q.contiguous()


def check_layout(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    log_votes: torch.Tensor | None,
    req_to_token: torch.Tensor,
    out: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = STORAGE_DTYPES,
) -> None:
    """ValueError, with what to do next, for shapes, strides and dtypes outside the contract. Reads no data, so that
    it costs a GPU no synchronisation."""
    pool, dtype, kv_dtype = k_pool.shape, q.dtype, k_pool.dtype  # each asked of torch once: this runs in every layer
    shape = q.shape
    dim = shape[2]
    packed = (dim, 1)  # strides of [head, dim] rows
    if pool != v_pool.shape or pool[2] != dim or shape[1] % pool[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k_pool {tuple(k_pool.shape)}, v_pool {tuple(v_pool.shape)} do not fit: "
            "K and V need one shape, q's head_dim, and q heads must be a multiple of kv heads"
        )
    if dtype not in dtypes or kv_dtype not in dtypes or v_pool.dtype != kv_dtype:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"q {q.dtype}, k_pool {k_pool.dtype}, v_pool {v_pool.dtype}: use {names}")
    if dim % 8 or dim > 256:
        raise ValueError(f"head_dim {dim} is not a multiple of 8 up to 256")
    if k_pool.stride()[1:] != packed or v_pool.stride()[1:] != packed or out.stride()[1:] != packed:
        raise ValueError("k_pool, v_pool and out need contiguous [head, dim] rows: copying a pool is too expensive")
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} must match q {tuple(q.shape)} {q.dtype}")
    if req_to_token.dtype != torch.int32 or req_to_token.stride(1) != 1:
        raise ValueError(f"req_to_token must be int32 with contiguous rows, got {req_to_token.dtype}")
    if log_votes is not None and (
        log_votes.dtype != torch.float32 or log_votes.shape != (pool[0], pool[1]) or log_votes.stride()[1] != 1
    ):
        raise ValueError(
            f"log_votes must be float32 {tuple(k_pool.shape[:2])} with contiguous rows, "
            f"got {log_votes.dtype} {tuple(log_votes.shape)}"
        )
