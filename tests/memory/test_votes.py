"""How votes spread over slots, as /metrics shows it."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.memory.votes import VOTE_BOUNDS, VoteStore


def test_every_slot_is_in_one_bucket_of_each_layer_and_head():
    store = VoteStore(layers=2, slots=20, kv_heads=3, device="cpu")
    store.log_votes[0][5:8] = torch.log(torch.tensor(3.0))
    store.log_votes[1][7, 2] = torch.log(torch.tensor(1000.0))
    spread = store.spread(torch.tensor([4, 5, 6, 7]))
    cells = 2 * 3
    expected = [0.0] * (len(VOTE_BOUNDS) + 1)
    expected[VOTE_BOUNDS.index(4)] = 3 * 3 / cells  # three slots, three heads of one layer
    expected[-1] = 1 / cells
    expected[VOTE_BOUNDS.index(1)] = 4 - sum(expected)  # the others stand for one token
    assert spread.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_bound_belongs_to_its_bucket_and_no_votes_to_none():
    store = VoteStore(layers=1, slots=len(VOTE_BOUNDS) + 1, kv_heads=1, device="cpu")
    for slot, bound in enumerate((*VOTE_BOUNDS, 0.0)):
        store.log_votes[0][slot] = torch.log(torch.tensor(float(bound)))
    assert store.spread(torch.arange(len(VOTE_BOUNDS) + 1)).tolist() == [1.0] * len(VOTE_BOUNDS) + [0.0]
