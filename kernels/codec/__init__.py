"""STAND-IN until the branch codec is merged: native only."""
from dataclasses import dataclass
import torch
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class BlockLayout:
    codec: str
    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return BLOCK_TOKENS * self.heads * (self.k_dim + self.v_dim) * self.dtype.itemsize


def _views(layout, arena):
    t = arena.view(layout.dtype).view(len(arena), BLOCK_TOKENS, layout.heads, layout.k_dim + layout.v_dim)
    return t[..., : layout.k_dim], t[..., layout.k_dim :]


def encode(layout, keys, values, slots, arena, blocks, counts):
    k, v = _views(layout, arena)
    at = 0
    for b, n in zip(blocks.tolist(), counts.tolist()):
        k[b, :n] = keys[slots[at : at + n]]
        v[b, :n] = values[slots[at : at + n]]
        at += n


def decode(layout, arena, blocks, counts, keys, values, slots):
    k, v = _views(layout, arena)
    at = 0
    for b, n in zip(blocks.tolist(), counts.tolist()):
        keys[slots[at : at + n]] = k[b, :n]
        values[slots[at : at + n]] = v[b, :n]
        at += n
