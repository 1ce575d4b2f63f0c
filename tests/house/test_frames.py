"""How deep the code is between SGLang's scheduler and a kernel: what a reader has to keep in mind at once."""

from __future__ import annotations

import sys
from array import array
from types import SimpleNamespace

import torch

from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.hooks import scheduler as hooks
from keepkv_sglang.kernels import choose
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.simulate.world import World
from tests.support.rotary import table
from tests.support.served import Server, text

MOST_FRAMES = 8
LAYERS, SLOTS, Q_HEADS, KV_HEADS, DIM = 2, 400, 4, 2, 16


def give_contents(rt) -> None:
    """The simulator's pool gets layers, so that there is something to compress."""
    keys, values = (torch.randn(LAYERS, SLOTS + 1, KV_HEADS, DIM) for _ in range(2))
    rt.kv_pool = SimpleNamespace(
        layer_num=LAYERS, start_layer=0, get_key_buffer=keys.__getitem__, get_value_buffer=values.__getitem__
    )
    rt.votes, rt.scales = VoteStore(LAYERS, SLOTS + 1, KV_HEADS, "cpu"), dict.fromkeys(range(LAYERS), DIM**-0.5)
    rt.rotary = Rotary(table(2000, DIM).float())
    arena = QueryArena(LAYERS, rt.arena.rows, Q_HEADS, DIM, torch.float32, "cpu")
    arena.queries.normal_()
    rt.arena = rt.limits.arena = arena


def test_from_the_scheduler_hook_to_the_scoring_kernel(monkeypatch):
    kernel = choose.implementation("score", torch.zeros(1))
    assert kernel is not None
    stacks: list[list[str]] = []
    real = kernel.window_sums

    def window_sums(*args):
        frame, names = sys._getframe(), []
        while frame.f_code is not hooks.before_update_running_batch.inner.__code__:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append([frame.f_code.co_name, *reversed(names)])
        return real(*args)

    monkeypatch.setattr(kernel, "window_sums", window_sums)
    world = World(KeepKVConfig(enabled=True, budget=0.2), slots=SLOTS, scale=1, longest=2000, rows=2)
    with world.running():
        give_contents(world.rt)
        req = Server(world).admit(text(0, 200), 8)
        assert world.prefill(req)
        before = req.kv.kv_committed_len
        lengths = torch.tensor([before])
        batch = SimpleNamespace(reqs=[req], seq_lens=lengths, seq_lens_cpu=lengths, device="cpu", batch_is_full=False)
        hooks.before_update_running_batch(None, batch)
        assert batch.seq_lens.tolist() == [req.kv.kv_committed_len] and req.kv.kv_committed_len < before / 2
        world.prefilled(req)
        world.finish(req, array("q", text(9000, 8)))
        world.check()
    assert stacks and max(map(len, stacks)) <= MOST_FRAMES, max(stacks, key=len)
