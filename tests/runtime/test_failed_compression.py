"""An error in the middle of a compression changes nothing: row, pool, votes, tree and counters are as before, and the
request goes on uncompressed. With a pool that has contents, at every layer."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from keepkv_sglang.faults import guard
from keepkv_sglang.runtime import compressor
from tests.runtime.test_originals_contents import FIRST, KV_HEADS, LAYERS, give_contents
from tests.support.served import serving, text

ROOMY, TIGHT = 600, len(FIRST) + 24  # with the second a result finds no slots beside the span


class Failing:
    """row_pieces, or packed_pieces, that raises once, when `layers` layers are written; of all of them: behind the last
    one."""

    def __init__(self, layers: int, kind: str = "row_pieces") -> None:
        self.layers, self.fails, self.real, self.results = layers, True, getattr(compressor, kind), 0
        self.each = KV_HEADS if kind == "packed_pieces" else 1

    def __call__(self, *args: Any) -> Iterator[Any]:
        yield from map(self._piece, self.real(*args))
        if self.fails and self.layers == LAYERS:
            self._fail()

    def _piece(self, results: Iterable[Any]) -> Iterator[Any]:
        for result in results:
            if self.fails and self.results == self.layers * self.each:
                self._fail()
            self.results += 1
            yield result

    def _fail(self) -> None:
        self.fails = False
        raise torch.OutOfMemoryError("injected")


def seen(server: Any, req: Any, pools: Any) -> tuple[Any, ...]:
    """What must not change: the row's slots and what lies in them, lengths, offset, free slots, counters."""
    rt, kv = server.rt, req.kv
    row = rt.req_to_token_pool.req_to_token[kv.req_pool_idx, : kv.kv_committed_len].long()
    contents = [pool[:, row].clone() for pool in pools] + [votes[row].clone() for votes in rt.votes.log_votes]
    contents.append(rt.cells.span_of[row].clone())
    state = rt.requests.state_of(req)
    counters = {key: value for key, value in asdict(rt.counters).items() if not key.endswith("seconds")}
    counts = (
        kv.kv_committed_len, kv.kv_allocated_len, kv.cache_protected_len, state.offset, state.compressions,
        rt.allocator.available_size(), rt.active_rows, int(rt.offsets[kv.req_pool_idx]), counters,
    )  # fmt: skip
    return row.tolist(), contents, counts


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == other[0] and one[2] == other[2]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("heads", ["uniform", "all"])
@pytest.mark.parametrize("slots", [ROOMY, TIGHT])
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_a_prompt_goes_on_uncompressed(monkeypatch: pytest.MonkeyPatch, slots: int, layer: int, heads: str):
    kind = "row_pieces" if heads == "uniform" else "packed_pieces"
    monkeypatch.setattr(guard, "errors", guard.Counter())
    with serving(slots=slots, references=4, heads=heads) as server:
        pools = give_contents(server, "native")
        server.rt.originals = None
        server.tree.host = None
        req = server.admit(FIRST, reply=20)
        assert server.world.prefill(req)
        server.tree.publish_anchor(req, server.rt.requests.state_of(req).anchor_len)  # comes before, and stays
        before = seen(server, req, pools)
        room = server.rt.allocator.available_size()
        monkeypatch.setattr(compressor, kind, Failing(layer, kind))
        server.world._compress(req)
        assert guard.errors["compression"] == 1
        assert_same(seen(server, req, pools), before)
        assert server.rt.arena.free_rows == server.rt.arena.rows, "its queries were given back"
        assert (slots == ROOMY) == (room >= len(FIRST) // 4), "both ways were taken"
        server.world.prefilled(req)
        server.world.finish(req, array("q", text(9000, 20)))
        assert server.rt.counters.compressions == 0
        # What follows is as if nothing had happened.
        server.run([*FIRST[:-1], 1], reply=4)
        assert server.rt.counters.compressions > 0


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_result_that_needs_more_slots_than_the_turn_has(monkeypatch: pytest.MonkeyPatch, layer: int):
    """Under a budget in slots a short turn's result goes into its own slots and into others taken for it."""
    monkeypatch.setattr(guard, "errors", guard.Counter())
    kind, taken, allocate = {"budget": 80}, [], compressor.allocate
    monkeypatch.setattr(compressor, "allocate", lambda rt, count: taken.append(count) or allocate(rt, count))
    with serving(references=4) as server:
        pools = give_contents(server, "native")
        server.rt.originals = None
        server.tree.host = None
        server.run(FIRST, 4, kind)
        req = server.admit([*FIRST, *text(9000, 4), *text(3000, 40)], 20, kind)
        assert server.world.prefill(req)
        before, done = seen(server, req, pools), server.rt.counters.compressions
        monkeypatch.setattr(compressor, "row_pieces", Failing(layer))
        server.world._compress(req)
        assert guard.errors["compression"] == 1 and server.rt.counters.compressions == done
        assert_same(seen(server, req, pools), before)
        assert 0 < taken[-1] < 80, "slots of both kinds"
        server.world.prefilled(req)
        server.world.finish(req, array("q", text(9000, 20)))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_reply_goes_on_uncompressed(monkeypatch: pytest.MonkeyPatch, layer: int):
    monkeypatch.setattr(guard, "errors", guard.Counter())
    with serving(references=4) as server:
        give_contents(server, "native")
        server.rt.originals = None
        server.tree.host = None
        req = server.admit(FIRST, reply=60)
        assert server.world.prefill(req)
        server.world.prefilled(req)
        done = server.rt.counters.compressions
        assert done > 0
        monkeypatch.setattr(compressor, "packed_pieces", Failing(layer, "packed_pieces"))
        server.world.finish(req, array("q", text(9000, 60)))
        assert guard.errors["compression"] == 1 and server.rt.counters.compressions == done
        assert server.rt.requests.state_of(req).broken


def test_a_prompt_that_cannot_stay_uncompressed_fails(monkeypatch: pytest.MonkeyPatch):
    """Longer than the pool, it is compressed between its chunks: an error there is raised."""
    with serving(slots=280, chunk_tokens=64, references=0) as server:
        give_contents(server, "native")
        server.rt.originals = None
        server.tree.host = None
        req = server.admit([*FIRST, *text(5000, 100)])
        assert server.rt.requests.too_long(req)
        monkeypatch.setattr(compressor, "packed_pieces", Failing(0, "packed_pieces"))
        with pytest.raises(torch.OutOfMemoryError):
            server.world.prefill(req)
        server.rt.requests.state_of(req).broken = True
        server.world.abort(req)
