"""Beside the KV pool: votes, and the tokens of slots.

Votes p_i are kept as log p_i (float32), so that an unmerged token is 0 and adding them to a logit is Eq. 6 of
arXiv 2504.09936. Persistent cost per slot and layer: 4 bytes per kv head, against 4 * head_dim bytes of K and V
per kv head at 16 bit: 1.6 % at head_dim 64, 0.8 % at 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keepkv_sglang.kernels.host import on_device

VOTE_BYTES = 4  # of one log vote
VOTE_BOUNDS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)
"""Where `spread` cuts. Fitted votes are no whole numbers, and may be below 1."""


class VoteStore:
    """log_votes[layer]: float32 [slots, kv_heads], one row per KV slot of the pool."""

    def __init__(self, layers: int, slots: int, kv_heads: int, device: torch.device | str) -> None:
        self.log_votes = [torch.zeros(slots, kv_heads, dtype=torch.float32, device=device) for _ in range(layers)]

    def reset(self, layer: int, slots: torch.Tensor) -> None:
        """A slot that is rewritten by a forward pass stands for one token again. Mutates the store."""
        self.log_votes[layer].index_fill_(0, slots, 0.0)

    def spread(self, slots: torch.Tensor) -> torch.Tensor:
        """How many of `slots` [m] have votes up to each of VOTE_BOUNDS, above the bound before it, and above the last:
        float32 [len(VOTE_BOUNDS) + 1], means over layers and kv heads. On a GPU nobody waits for it."""
        found = torch.stack([votes[slots] for votes in self.log_votes])
        bounds = on_device(torch.log(torch.tensor((0, *VOTE_BOUNDS, torch.inf))), found.device)
        up_to = (found.flatten()[None] <= bounds[:, None]).sum(1, dtype=torch.float32)
        return torch.diff(up_to) / (found.shape[0] * found.shape[2])

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.log_votes)


class SlotTokens:
    """The token that a forward wrote into each slot, int32 [slots]; UNKNOWN where a slot is not one token's.

    The last check before a slot is shown under a token. On a CPU only: on a GPU it would make the scheduler wait.
    """

    UNKNOWN = -1

    def __init__(self, slots: int) -> None:
        self.tokens = torch.full((slots,), self.UNKNOWN, dtype=torch.int32)

    def write(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """A forward computes K and V of `tokens` [T] in `slots` [T]."""
        self.tokens[slots] = tokens.to(torch.int32)

    def forget(self, slots: torch.Tensor) -> None:
        """A compression writes into these slots."""
        self.tokens[slots] = self.UNKNOWN

    def known(self, slots: torch.Tensor) -> torch.Tensor:
        """bool [m]: which of `slots` [m] a forward wrote last."""
        return self.tokens[slots] != self.UNKNOWN

    def hold(self, slots: torch.Tensor, tokens: Sequence[int]) -> bool:
        """Whether each slot is known to hold its token, or not known at all."""
        have = self.tokens[slots]
        wanted = torch.tensor(tokens, dtype=torch.int64).to(torch.int32)
        return bool(((have == self.UNKNOWN) | (have == wanted)).all())

    @property
    def nbytes(self) -> int:
        return self.tokens.numel() * self.tokens.element_size()
