"""Requests run one after the other through the real cache manager, without a model."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.simulate.traces import BORDER
from keepkv_sglang.tools.simulate.world import CHUNK_TOKENS, World

OFF = {"enabled": False}
SYSTEM = [*range(100, 140), BORDER]  # 41 tokens
RIDS = count()


def text(first: int, length: int) -> list[int]:
    return list(range(first, first + length))


class Server:
    """Runs one request after the other."""

    def __init__(self, world: World) -> None:
        self.world, self.tree, self.rt = world, world.tree, world.rt

    def admit(self, prompt: list[int], reply: int = 4, kind: Any = None) -> Any:
        sampling = SamplingParams(max_new_tokens=reply, custom_params={"keepkv": kind} if kind else None)
        req = Req(f"r{next(RIDS)}", "", array("q", prompt), sampling)
        assert self.world.admit(req)
        return req

    def run(self, prompt: list[int], reply: int = 4, kind: Any = None) -> int:
        """Returns how many tokens were cached."""
        req = self.admit(prompt, reply, kind)
        cached = req.prefix_len
        assert self.world.prefill(req)
        self.world.prefilled(req)
        self.world.finish(req, array("q", text(9000, reply)))
        if not self.world.promised:
            self.tree.check()
        return cached

    def cached(self, prompt: list[int], kind: Any = None) -> int:
        """How many tokens a request would find; ages change, nothing else."""
        req = self.admit(prompt, 1, kind)
        self.world.abort(req)
        return req.prefix_len


@contextmanager
def serving(slots: int = 600, chunk_tokens: int = CHUNK_TOKENS, **settings: Any) -> Iterator[Server]:
    """A server of budget 0.25 unless `settings` say otherwise; at its end every slot has an owner and all are given
    back."""
    values = {"budget": 0.25, "window": 4, "recent": 2, "sinks": 1, "interval": 16, "min_tokens": 8, **settings}
    world = World(
        KeepKVConfig(enabled=True, **values), slots=slots, scale=1, longest=2000, rows=4, chunk_tokens=chunk_tokens
    )
    with world.running():
        yield Server(world)
        world.check()
        world.flush()
