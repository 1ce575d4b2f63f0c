"""Pools, blocks and counts for the tests of kernels/codec, and what must hold of each."""

from __future__ import annotations

from types import ModuleType

import torch

from keepkv_sglang.kernels.codec import reference
from keepkv_sglang.kernels.codec.layout import BLOCK_TOKENS, CODECS, DTYPES, GROUP, BlockLayout

SIZES = [(3, 64, 64), (1, 80, 80), (2, 96, 48), (1, 128, 128), (1, 256, 64), (2, 16, 256)]  # heads, D, Dv
COUNTS = (64, 1, 17, 64, 2, 33)
LAYOUTS = [BlockLayout(codec, *size, dtype) for codec in CODECS for dtype in DTYPES for size in SIZES]


def name(layout: BlockLayout) -> str:
    dtype = str(layout.dtype).removeprefix("torch.")
    return f"{layout.codec}-{layout.heads}x{layout.k_dim}+{layout.v_dim}-{dtype}"


class Case:
    """Tokens in scattered slots, blocks at any place of an arena of random bytes.

    spread: standard deviation of the logarithm of the tokens' sizes; offset: a channel's mean is a normal number times
    that; size: of all.
    """

    def __init__(self, layout, counts=COUNTS, *, seed=0, spread=2.0, offset=3.0, size=1.0, device="cpu"):
        self.layout, self.device = layout, device
        gen = torch.Generator().manual_seed(seed)
        self.n, self.spare = sum(counts), 5
        pools = []
        for dim in (layout.k_dim, layout.v_dim):
            x = torch.randn(self.n + self.spare, layout.heads, dim, generator=gen)
            x *= (torch.randn(*x.shape[:2], 1, generator=gen) * spread).exp()
            x += torch.randn(1, *x.shape[1:], generator=gen) * offset
            pools.append((x * size).clamp(-6e4, 6e4).to(layout.dtype).to(device))
        self.keys, self.values = pools
        self.slots = torch.randperm(self.n + self.spare, generator=gen)[: self.n].to(device)
        self.counts = torch.tensor(counts, device=device)
        self.blocks = torch.randperm(len(counts) + 3, generator=gen)[: len(counts)].to(device)
        shape = len(counts) + 3, layout.block_bytes
        self.arena = torch.randint(256, shape, generator=gen, dtype=torch.uint8).to(device)

    def encode(self, kernel: ModuleType, pools: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The arena afterwards; the case's stays as it is."""
        arena, pools = self.arena.clone(), pools or [self.keys, self.values]
        kernel.encode(self.layout, *pools, self.slots, arena, self.blocks, self.counts)
        return arena

    def decode(self, kernel: ModuleType, arena: torch.Tensor) -> list[torch.Tensor]:
        """Pools that held sevens before."""
        pools = [torch.full_like(x, 7) for x in (self.keys, self.values)]
        kernel.decode(self.layout, arena, self.blocks, self.counts, *pools, self.slots)
        return pools

    def unused(self) -> torch.Tensor:
        return torch.tensor(sorted(set(range(self.n + self.spare)) - set(self.slots.tolist())), device=self.device)

    def steps(self, arena: torch.Tensor) -> list[list[torch.Tensor]]:
        """Of K and V: zero and scale of every number [n, H, D], float32, read from the arena."""
        k_meta, v_meta, _, _ = reference._regions(self.layout, arena[self.blocks])
        used, dim_v = reference._places(self.counts)[0], self.layout.v_dim
        found = []
        for meta, dim in ((k_meta, self.layout.k_dim), (v_meta, dim_v)):
            half = reference._numbers(meta, torch.float16).float()
            if self.layout.codec == "int8":
                scale = half.unsqueeze(3).expand(-1, -1, -1, dim)
                pair = [torch.zeros_like(scale), scale]
            elif meta is k_meta:
                pair = [x.unsqueeze(2).expand(-1, -1, BLOCK_TOKENS, -1) for x in half.chunk(2, 2)]
            else:
                groups = half.unflatten(2, (2, -1, BLOCK_TOKENS)).transpose(3, 4)
                pair = list(groups.repeat_interleave(GROUP, 4)[..., :dim].unbind(2))
            found.append([x.transpose(1, 2)[used] for x in pair])
        return found


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def check_equal(case: Case, kernel: ModuleType) -> None:
    """kernel writes the reference's bytes and numbers, and nothing else."""
    wanted = case.encode(reference)
    assert same_bytes(case.encode(kernel), wanted)
    for got, expected in zip(case.decode(kernel, wanted), case.decode(reference, wanted), strict=True):
        assert same_bytes(got, expected)


def check_error(case: Case, kernel: ModuleType) -> None:
    """What is read differs by half a step, and half a unit of the pool dtype's last digit, at most."""
    arena = case.encode(kernel)
    digits = torch.finfo(case.layout.dtype).eps / 2
    for pool, read, pair in zip((case.keys, case.values), case.decode(kernel, arena), case.steps(arena), strict=True):
        x, got, scale = pool[case.slots].float(), read[case.slots].float(), pair[1]
        x = torch.where(x.isfinite(), x, 0)
        # 2^-24: half the smallest float16, once for the scale and once for a float16 pool
        bound = scale / 2 * (1 + 2**-12) + got.abs() * digits * (1 + 2**-12) + 2**-24
        assert (got - x).abs().le(bound).all(), ((got - x).abs() / bound).max()
        assert (read[case.unused()] == 7).all()


def check_again(case: Case, kernel: ModuleType) -> None:
    """Encoding what was read gives the same bytes, but for int4: there where a step is below 2^-9 of zero
    (reference.py)."""
    first = case.encode(kernel)
    pools = case.decode(kernel, first)
    second = case.encode(kernel, pools)
    if case.layout.codec != "int4":
        assert same_bytes(first, second)
        return
    again = case.decode(kernel, second)
    for a, b, (zero, scale) in zip(pools, again, case.steps(first), strict=True):
        a, b = a[case.slots], b[case.slots]
        narrow = scale <= 2**-9 * zero.abs()
        assert (a == b)[~narrow].all()
        most = max(2**-10, torch.finfo(case.layout.dtype).eps)
        assert (a.float() - b.float()).abs().le(most * zero.abs()).all()
