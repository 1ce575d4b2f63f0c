"""Originals in the evaluator: the K/V of compressed tokens as they were computed, and the row that is made of them.

What the server does with host memory, for one conversation. Same as there: a token is archived by the first
compression that covers it, before the merge; blocks of at most BLOCK_TOKENS tokens begin where the archive ended; a
block is encoded once. Not as there: blocks are decoded when they are archived, which gives the same numbers, and there
is room for all of them.
"""

from __future__ import annotations

import copy

import torch

from keepkv_sglang.kernels.codec import BLOCK_TOKENS, BlockLayout, decode, encode
from keepkv_sglang.tools.evaluate.probe import Row, Slots
from keepkv_sglang.turn.spans import DueSpan
from keepkv_sglang.turn.unpack import Matched, history

NATIVE = "native"


class Archive:
    """Originals of tokens [begin, end) of a conversation; begin == end: nothing was compressed yet.

    codec: "native" (float32, the probe's), "int8" or "int4". Tokens before `begin` lie in the row with a slot each, and
    so do, at its end, those from `end` on.
    """

    def __init__(self, codec: str) -> None:
        self.codec, self.begin, self.end = codec, 0, 0
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # k, v [end - begin, Hkv, D], decoded

    def clone(self) -> Archive:
        """An independent archive on the same tensors."""
        other = copy.copy(self)
        other._layers = list(self._layers)
        return other

    def take(self, row: Row, due: DueSpan) -> None:
        """Before `due` is compressed in `row`: archives its tokens that are not archived yet. They are its last, with a
        slot each."""
        if self.begin == self.end:
            self.begin = self.end = due.first
        stop = due.start + due.slots
        new = [layer.cut(stop - (due.end - self.end), stop) for layer in row.layers]
        read = [(slots.k, slots.v) if self.codec == NATIVE else through(self.codec, slots.k, slots.v) for slots in new]
        before = self._layers or [(slots.k[:0], slots.v[:0]) for slots in new]
        self._layers = [
            (torch.cat((k, more_k)), torch.cat((v, more_v)))
            for (k, v), (more_k, more_v) in zip(before, read, strict=True)
        ]
        self.end = due.end

    def history(self, row: Row, prompt_tokens: int, queries: int) -> int | None:
        """Tokens of the row that a prompt of `prompt_tokens` reads as originals (turn/unpack.py); None: it reads the
        row as it is."""
        compressed = self.begin < self.end
        return history(Matched(self.begin, row.tokens, self.end, compressed), self.end, prompt_tokens, queries)

    def unpack(self, row: Row, tokens: int) -> None:
        """The row becomes the original K/V of its first `tokens` tokens: a slot per token, log votes 0."""
        raw = row.slots - (row.tokens - self.end)
        layers = []
        for layer, (k, v) in zip(row.layers, self._layers, strict=True):
            front, back = layer.cut(0, self.begin), layer.cut(raw, row.slots)
            lv = layer.lv.new_zeros(row.tokens, layer.lv.shape[1])
            layers.append(Slots(torch.cat((front.k, k, back.k)), torch.cat((front.v, v, back.v)), lv).cut(0, tokens))
        row.replace_span(layers)
        row.tokens = tokens


def through(codec: str, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """keys, values [n, Hkv, D] of one layer -> what is read back of them: decode(encode()) in blocks of BLOCK_TOKENS
    tokens, the last one shorter."""
    n, heads, dim = keys.shape
    layout = BlockLayout(codec, heads, dim, values.shape[2], keys.dtype)
    counts = torch.tensor([min(BLOCK_TOKENS, n - at) for at in range(0, n, BLOCK_TOKENS)], dtype=torch.int64)
    blocks, slots = torch.arange(len(counts)), torch.arange(n)
    arena = torch.empty(len(counts), layout.block_bytes, dtype=torch.uint8, device=keys.device)
    keys, values = keys.contiguous(), values.contiguous()
    encode(layout, keys, values, slots, arena, blocks, counts)
    k, v = torch.empty_like(keys), torch.empty_like(values)
    decode(layout, arena, blocks, counts, k, v, slots)
    return k, v
