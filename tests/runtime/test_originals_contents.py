"""What comes back from host memory, with a pool that has contents: native bit for bit, int4 within its step, protected
tokens bit for bit under every codec (H10), and an unpacked slot has one vote."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch

from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.cells import PackedCells
from keepkv_sglang.memory.originals import BlockLayout, BlockStore, Staging
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.runtime.originals import Originals
from keepkv_sglang.runtime.unpack import HostSide
from tests.support.rotary import table
from tests.support.served import SYSTEM, serving, text

LAYERS, SLOTS, KV_HEADS, Q_HEADS, DIM = 2, 600, 2, 4, 32
FIRST = [*SYSTEM, *text(1000, 160)]
SECOND = [*FIRST, *text(9000, 4), *text(3000, 40)]
KIND = {"protect": "60-70,150-155"}


def give_contents(server, codec):
    rt = server.rt
    torch.manual_seed(0)
    keys, values = (torch.randn(LAYERS, SLOTS + 1, KV_HEADS, DIM) for _ in range(2))
    rt.kv_pool = SimpleNamespace(
        layer_num=LAYERS, start_layer=0, get_key_buffer=keys.__getitem__, get_value_buffer=values.__getitem__
    )
    rt.votes, rt.scales = VoteStore(LAYERS, SLOTS + 1, KV_HEADS, "cpu"), dict.fromkeys(range(LAYERS), DIM**-0.5)
    rt.cells = PackedCells.of(list(keys), list(values), rt.votes.log_votes)
    rt.rotary = Rotary(table(2000, DIM).float())
    arena = QueryArena(LAYERS, rt.arena.rows, Q_HEADS, DIM, torch.float32, "cpu")
    arena.queries.normal_()
    rt.arena = rt.limits.arena = arena
    layout = BlockLayout(codec, KV_HEADS, DIM, DIM, torch.float32)
    store, staging = BlockStore(layout, LAYERS, 64), Staging(layout, 400)
    rt.originals = Originals(store, list(keys), list(values), rt.counters, staging)
    server.tree.host = HostSide(rt)
    return keys, values


def first_turn(server, codec):
    """Runs FIRST: the pools, and K and V of its tokens as they were computed."""
    pools = give_contents(server, codec)
    req = server.admit(FIRST, kind=KIND)
    assert server.world.prefill(req)
    row = server.rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(FIRST)].long()
    computed = [pool[:, row].clone() for pool in pools]
    server.world.prefilled(req)
    server.world.finish(req, array("q", text(9000, 4)))
    return pools, computed


@pytest.mark.parametrize("codec", ["native", "int8", "int4"])
def test_what_was_computed_comes_back(codec):
    with serving(unpack=1.0, host_ratio=1.0, references=0) as server:
        pools, computed = first_turn(server, codec)
        req = server.admit(SECOND, kind=KIND)
        assert server.world.prefill(req)
        row = server.rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(FIRST) - 1].long()
        state = server.rt.requests.state_of(req)
        assert state.unpacked_tokens == len(FIRST) + 3 - len(SYSTEM)
        exact = [*range(len(SYSTEM)), *range(60, 70), *range(150, 155)]
        lossy = sorted(set(range(len(FIRST) - 1)) - set(exact))
        for pool, before in zip(pools, computed, strict=True):
            after = pool[:, row]
            assert torch.equal(after[:, exact], before[:, exact])
            error = (after - before[:, : len(FIRST) - 1]).abs()[:, lossy]
            # Half a step of randn's range over 64 tokens or 32 channels.
            assert float(error.max()) <= {"native": 0.0, "int8": 0.02, "int4": 0.35}[codec]
            assert codec == "native" or float(error.mean()) > 1e-3
        assert all(float(votes[row].abs().max()) == 0 for votes in server.rt.votes.log_votes)
        server.world.prefilled(req)
        server.world.finish(req, array("q", text(9000, 4)))
