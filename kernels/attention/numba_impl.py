"""Vote-weighted attention in numba, for machines without a C++ compiler. See the package's docstring for the
contract.

Flash-style: a work unit is (request, kv head, a few queries); K and V are gathered in blocks of _KEYS rows.
Pools are passed as flat bit patterns (uint32 for float32, uint16 for bfloat16), so that one source serves
both and any stride(0) is one specialisation: the first call per dtype compiles (about ten seconds), later
processes load numba's cache.
"""

from __future__ import annotations

import os

import numba
import numpy as np
import torch

from .contract import MASKED, as_int64, check, refuse_packed
from .packed import Packed

name = "numba"

# numba's own OpenMP runtime would spin against torch's: on two cores the model's matrix products take several times as
# long (docs/log.md). This layer has threads that sleep. It stops the process when two threads compute at once; a
# scheduler has one.
if not os.environ.get("NUMBA_THREADING_LAYER"):
    numba.config.THREADING_LAYER = "workqueue"

_KEYS = 64
_ROWS = 48  # queries x group of one work unit: their state stays in L1/L2
_f = np.float32
_MASKED, _NEG_INF = _f(MASKED), _f(-np.inf)
_LOWEST, _LOG2E, _HALF = _f(-87.33654), _f(1.44269504), _f(0.5)
_LN2_HI, _LN2_LO = _f(0.693359375), _f(-2.12194440e-4)
_P0, _P1, _P2 = _f(1.9875691500e-4), _f(1.3981999507e-3), _f(8.3334519073e-3)
_P3, _P4, _P5 = _f(4.1665795894e-2), _f(1.6666665459e-1), _f(5.0000001201e-1)
_ZERO, _ONE = _f(0.0), _f(1.0)
# What sums need to be vectorised. Not "fast": that assumes away the infinities of masked entries.
_SUMS = {"reassoc", "contract", "nsz"}


@numba.njit(cache=True, fastmath={"contract"})  # no reassoc: it would undo the two-step range reduction
def _exp_row(s, n, shift, bits):
    """s[:n] = exp(s[:n] - shift), arguments <= 0; -inf gives 0, NaN NaN. bits: int32 scratch of the same length."""
    powers = bits.view(np.float32)
    for i in range(n):
        x = s[i] - shift
        c = x if x > _LOWEST else _LOWEST
        k = np.floor(c * _LOG2E + _HALF)
        r = (c - k * _LN2_HI) - k * _LN2_LO
        p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        bits[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
        s[i] = p * (r * r) + r + _ONE if x >= _LOWEST else (_ZERO if x < _LOWEST else x)
    for i in range(n):
        s[i] *= powers[i]


@numba.njit(cache=True)
def _gather(src, shift, dst):
    """dst = src << shift. Takes slices: with an offset in the index nothing would be vectorised."""
    for d in range(dst.shape[0]):
        dst[d] = np.uint32(src[d]) << shift


@numba.njit(cache=True, fastmath=_SUMS)
def _score(q, k, n, scale, bias, s):
    """s[:n] = q . k[j] * scale + bias[j], or -inf where masked; returns the maximum."""
    top = _NEG_INF
    for j in range(n):
        total = _ZERO
        for d in range(q.shape[0]):
            total += q[d] * k[j, d]
        s[j] = total * scale + bias[j] if bias[j] > _MASKED else _NEG_INF
        top = max(top, s[j])
    return top


@numba.njit(cache=True, fastmath=_SUMS)
def _weigh(weight, v, n, acc):
    """acc += sum_j weight[j] v[j]; returns the sum of the weights."""
    total = _ZERO
    for j in range(n):
        w = weight[j]
        total += w
        for d in range(acc.shape[0]):
            acc[d] += w * v[j, d]
    return total


@numba.njit(cache=True)
def _unit(q, k, v, strides, shift, votes, slots, length, new, head, row0, row1, group, causal, scale, out):
    """Rows [row0, row1) (query * group + head) of one request and kv head. q, out: [new, Hq, D] of the
    request."""
    dim = q.shape[2]
    rows = row1 - row0
    acc, total = np.zeros((rows, dim), np.float32), np.zeros(rows, np.float32)
    tops = np.full(rows, _NEG_INF, np.float32)
    k_bits, v_bits = np.empty((_KEYS, dim), np.uint32), np.empty((_KEYS, dim), np.uint32)
    kb, vb = k_bits.view(np.float32), v_bits.view(np.float32)
    bias, s, bits = np.zeros(_KEYS, np.float32), np.empty(_KEYS, np.float32), np.empty(_KEYS, np.int32)
    past = length - new
    end = past + (row1 - 1) // group + 1 if causal else length
    for k0 in range(0, end, _KEYS):
        n = min(_KEYS, end - k0)
        for j in range(n):
            slot = np.int64(slots[k0 + j])
            a, b = slot * strides[0] + head * dim, slot * strides[1] + head * dim
            _gather(k[a : a + dim], shift, k_bits[j])
            _gather(v[b : b + dim], shift, v_bits[j])
            if strides[2] > 0:
                bias[j] = votes[slot * strides[2] + head]
        for r in range(rows):
            query, lane = (row0 + r) // group, head * group + (row0 + r) % group
            seen = min(n, past + query + 1 - k0) if causal else n
            if seen <= 0:
                continue
            top = max(tops[r], _score(q[query, lane], kb, seen, scale, bias, s))
            if top == _NEG_INF:  # nothing but masked entries and NaN
                for j in range(seen):
                    total[r] += s[j] if s[j] != _NEG_INF else _ZERO
                continue
            _exp_row(s, seen, top, bits)
            if tops[r] != top:
                factor = np.exp(tops[r] - top)
                total[r] *= factor
                for d in range(dim):
                    acc[r, d] *= factor
                tops[r] = top
            total[r] += _weigh(s, vb, seen, acc[r])
    for r in range(rows):
        query, lane = (row0 + r) // group, head * group + (row0 + r) % group
        inverse = _ONE / total[r] if total[r] != _ZERO else _ZERO
        for d in range(dim):
            out[query, lane, d] = acc[r, d] * inverse


@numba.njit(cache=True, parallel=True)
def _run(q, k, v, strides, shift, votes, table, rows, lens, starts, units, group, causal, scale, out):
    """units: [U, 4] int64 (request, kv head, first row, end row)."""
    for i in numba.prange(units.shape[0]):
        b, head, r0, r1 = units[i, 0], units[i, 1], units[i, 2], units[i, 3]
        mine, result = q[starts[b] : starts[b + 1]], out[starts[b] : starts[b + 1]]
        base = rows[b] * strides[3]
        slots = table[base : base + lens[b]]
        new = starts[b + 1] - starts[b]
        # fmt: off
        _unit(mine, k, v, strides, shift, votes, slots, lens[b], new, head, r0, r1, group, causal, scale,
              result)
        # fmt: on


@numba.njit(cache=True)
def _slots_valid(table, stride, rows, lens, limit):
    for b in range(rows.shape[0]):
        for i in range(lens[b]):
            slot = table[rows[b] * stride + i]
            if slot < 0 or slot >= limit:
                return False
    return True


def _flat(x: torch.Tensor, bits: torch.dtype | None = None) -> np.ndarray:
    """The memory under x, from its first to its last element, as one contiguous array."""
    x = x if bits is None else x.view(bits)
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((size,), (1,)).numpy()


def extend(
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
) -> None:
    refuse_packed(packed)
    q = check(q, k_pool, v_pool, log_votes, req_to_token, out)
    batch, heads_kv = len(rows), k_pool.shape[1]
    group = q.shape[1] // heads_kv
    rows, lens = as_int64(rows, "rows", batch), as_int64(seq_lens, "seq_lens", batch)
    news = as_int64(extend_lens, "extend_lens", batch)
    starts = torch.zeros(batch + 1, dtype=torch.int64)
    torch.cumsum(news, 0, out=starts[1:])
    if int(starts[-1]) != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows, the lengths ask for {int(starts[-1])}")
    real = lens > 0
    bad_row = real & ((rows < 0) | (rows >= req_to_token.shape[0]) | (news > lens))
    if bool((bad_row | (lens < 0) | (lens > req_to_token.shape[1]) | (news < 0)).any()):
        raise IndexError("attention: rows, seq_lens or extend_lens point outside req_to_token")
    table = _flat(req_to_token)
    votes_stride = 0 if log_votes is None else log_votes.stride(0)  # 0: no votes
    strides = np.array([k_pool.stride(0), v_pool.stride(0), votes_stride, req_to_token.stride(0)])
    if not _slots_valid(table, strides[3], rows.numpy(), lens.numpy(), k_pool.shape[0]):
        raise IndexError("attention: a slot is outside the pool")
    units = [
        (b, head, row0, min(row0 + _ROWS, new * group))
        for b, (length, new) in enumerate(zip(lens.tolist(), news.tolist(), strict=True))
        if length
        for row0 in range(0, new * group, _ROWS)
        for head in range(heads_kv)
    ]
    # Requests without KV have no unit and keep their zeros.
    result = torch.zeros(q.shape, dtype=torch.float32)
    if units:
        threads = torch.get_num_threads()
        numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
        bits = torch.uint32 if k_pool.dtype == torch.float32 else torch.uint16
        _run(
            q.float().contiguous().numpy(),
            _flat(k_pool, bits),
            _flat(v_pool, bits),
            strides,
            np.uint32(0 if bits == torch.uint32 else 16),
            np.zeros(1, np.float32) if log_votes is None else _flat(log_votes),
            table,
            rows.numpy(),
            lens.numpy(),
            starts.numpy(),
            np.array(units, dtype=np.int64),
            group,
            bool(causal),
            np.float32(scale),
            result.numpy(),
        )
        # With NUMBA_THREADING_LAYER=omp numba binds to torch's OpenMP runtime (found first) and leaves its own thread
        # count there.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
    out.copy_(result)


def decode(
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
) -> None:
    refuse_packed(packed)
    ones = torch.ones(q.shape[0], dtype=torch.int64)
    extend(q, k_pool, v_pool, log_votes, req_to_token, rows, seq_lens, ones, scale, out)
