"""One kv head of a layer as the oracles (score/reference.py, merge/reference.py) read it: plain tensors, any dtype."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

RECENCY_HALF_LIFE = 4.0


class Head(NamedTuple):
    """One kv head. q [Q, D] scaled, window-major; k, v [n, D]; lv [n]; logits [n, Q]; seen [n, Q] bool;
    log_z [Q], of which log_z_ctx [Q] is the context; age [Q]: window steps between each query and the newest;
    reference [Q] bool: the query stands behind the span."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    logits: torch.Tensor
    seen: torch.Tensor
    log_z: torch.Tensor
    log_z_ctx: torch.Tensor
    age: torch.Tensor
    reference: torch.Tensor


def head_of(x: Any, h: int, dtype: torch.dtype = torch.float64) -> Head:
    """Everything kv head h needs, in `dtype`."""
    w, q_heads, dim = x.q.shape
    group = q_heads // x.k.shape[1]
    q = x.q[:, h * group : (h + 1) * group].to(dtype).reshape(w * group, dim) * x.scale
    position = x.q_index.repeat_interleave(group)
    k, v, lv = x.k[:, h].to(dtype), x.v[:, h].to(dtype), x.lv[:, h].to(dtype)
    logits = k @ q.T
    seen = torch.arange(k.shape[0], device=k.device)[:, None] <= position[None, :]
    in_span = (logits + lv[:, None]).masked_fill(~seen, -math.inf)
    in_context = x.k_ctx[:, h].to(dtype) @ q.T + x.lv_ctx[:, h].to(dtype)[:, None]
    log_z = torch.logsumexp(torch.cat((in_context, in_span)), 0)
    age = torch.arange(w - 1, -1, -1, device=k.device).repeat_interleave(group)
    return Head(q, k, v, lv, logits, seen, log_z, torch.logsumexp(in_context, 0), age, position >= len(k))


# Scores
