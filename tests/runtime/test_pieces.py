"""A prompt that is compressed in pieces (--keepkv-piece-tokens): nothing changes until all of it is there, and then it
is what it would have been at once. With a pool that has contents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH
from sglang.srt.mem_cache import common

from keepkv_sglang.faults import guard
from keepkv_sglang.runtime import step
from tests.runtime.test_failed_compression import assert_same, seen
from tests.runtime.test_originals_contents import FIRST, LAYERS, give_contents
from tests.support.served import serving, text

PIECE = {"uniform": 60, "all": 30}  # of 159 slots: a layer at a time
REPLY = text(9000, 20)
CALLS = {"uniform": LAYERS + 1, "all": 2 * LAYERS + 1}  # pieces, and the call that finds nothing left


class Conversation:
    """A request behind its prefill, whose prompt is due."""

    def __init__(self, server: Any) -> None:
        self.server, self.rt, self.world = server, server.rt, server.world
        self.pools = give_contents(server, "native")
        self.rt.originals = None
        server.tree.host = None
        self.req = server.admit(FIRST, reply=len(REPLY))
        assert self.world.prefill(self.req)
        common.checkpoint_kv_cache(self.req, server.tree)
        self.state = self.rt.requests.state_of(self.req)
        server.tree.publish_anchor(self.req, self.state.anchor_len)
        self.req.output_ids.append(REPLY[0])  # the prefill's

    def compress(self, others: int = 0) -> bool:
        """What a step does that would decode so many others too; whether the prompt is compressed then."""
        ended = [SimpleNamespace(keepkv=None, finished=lambda: True)] * others
        length = self.req.kv.kv_committed_len
        batch = SimpleNamespace(
            reqs=[self.req, *ended], seq_lens_cpu=torch.tensor([length]), device="cpu", batch_is_full=True
        )
        step.compress_batch(self.rt, batch, lambda *_: pytest.fail("compression failed"))
        assert batch.seq_lens_cpu[0] == self.req.kv.kv_committed_len
        assert batch.batch_is_full == (self.req.kv.kv_committed_len == length)
        self.world.check()
        return self.state.compressions > 0

    def decode(self) -> None:
        self.world._decode(self.req, 1)
        self.req.output_ids.append(REPLY[len(self.req.output_ids)])

    def end(self, steps: int = 0) -> None:
        """The reply ends, after so many more steps."""
        for _ in range(steps):
            self.decode()
            self.compress()
        self.world._end(self.req, FINISH_LENGTH(len(self.req.output_ids)))

    def contents(self) -> list[torch.Tensor]:
        """K, V and votes of the row's slots."""
        kv = self.req.kv
        row = self.rt.req_to_token_pool.req_to_token[kv.req_pool_idx, : kv.kv_committed_len].long()
        return [pool[:, row].clone() for pool in self.pools] + [votes[row] for votes in self.rt.votes.log_votes]


@contextmanager
def conversation(heads: str, piece: int | None = None, slots: int = 600) -> Iterator[Conversation]:
    piece = PIECE[heads] if piece is None else piece
    with serving(slots=slots, references=4, heads=heads, piece_tokens=piece) as server:
        yield Conversation(server)


@pytest.mark.parametrize("heads", ["uniform", "all"])
def test_a_piece_with_each_token_and_the_same_result(heads: str):
    with conversation(heads, piece=0) as at_once:
        assert at_once.compress()
        whole, row = at_once.contents(), at_once.req.kv.kv_committed_len
        at_once.end()
    with conversation(heads) as it:
        before = seen(it.server, it.req, it.pools)
        for call in range(1, CALLS[heads]):
            assert not it.compress()
            now = seen(it.server, it.req, it.pools)
            prompt = [part[:, : len(FIRST)] if part.dim() == 4 else part[: len(FIRST)] for part in now[1]]
            assert now[0][: len(FIRST)] == before[0]
            assert all(torch.equal(a, b) for a, b in zip(prompt, before[1], strict=True))
            taken = it.server.tree.unfinished_slots
            assert it.rt.allocator.available_size() == before[2][5] - taken - (call - 1), "its slots are taken once"
            assert not it.compress() and it.state.compression is not None, "the next one comes with the next token"
            it.decode()
        assert it.compress()
        assert it.state.compression is None and not it.server.tree.unfinished_slots
        decoded = CALLS[heads] - 1
        assert it.req.kv.kv_committed_len == row + decoded
        for ours, theirs in zip(it.contents(), whole, strict=True):
            ours = ours[:, :row] if ours.dim() == 4 else ours[:row]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # float32 sums over other groups of heads
        it.end()
        assert it.server.cached([*FIRST, 1]) > len(FIRST) - 10, "the next turn finds it"


@pytest.mark.parametrize("heads", ["uniform", "all"])
@pytest.mark.parametrize("end", ["finish", "abort", "retract"])
def test_who_ends_in_mid_way_loses_nothing(heads: str, end: str):
    """`serving` checks at its end that every slot and every row of queries came back."""
    for calls in range(1, CALLS[heads]):
        with conversation(heads) as it:
            for _ in range(calls):
                assert not it.compress()
                it.decode()
            if end == "finish":  # then all that is left is done at once
                it.end()
            else:
                getattr(it.world, end)(it.req)
            assert it.state.compression is None and not it.server.tree.unfinished_slots
            assert it.rt.counters.compressions == (end != "abort")
            it.server.run([*FIRST[:-1], 1], reply=4)


@pytest.mark.parametrize("heads", ["uniform", "all"])
def test_an_error_in_a_later_piece(monkeypatch: pytest.MonkeyPatch, heads: str):
    for calls in range(1, CALLS[heads]):
        monkeypatch.setattr(guard, "errors", guard.Counter())
        with conversation(heads) as it:
            for _ in range(calls):
                assert not it.compress()
                it.decode()
            before = seen(it.server, it.req, it.pools)
            available = before[2][5] + it.server.tree.unfinished_slots

            def fail(*_: Any) -> Any:
                raise torch.OutOfMemoryError("injected")
                yield

            it.state.compression.pieces = fail()
            it.decode()
            it.compress()
            assert guard.errors["compression"] == 1 and it.state.broken and it.state.compression is None
            after = seen(it.server, it.req, it.pools)
            assert after[0][:-1] == before[0] and it.rt.allocator.available_size() == available - 1
            it.world.check()
            it.end(2)


def test_a_step_that_is_short_of_slots_does_all_of_it():
    with conversation("all", slots=len(FIRST) + 100) as it:
        assert not it.compress(others=1)
        free = it.rt.allocator.available_size()
        assert not it.compress(others=free // 2 - 1) and it.compress(others=free // 2)
        it.end(2)


def test_without_slots_beside_the_prompt_it_is_compressed_at_once():
    """Its result overwrites its own slots, which the next forward reads."""
    with conversation("all", slots=len(FIRST) + 24) as it:
        assert it.compress()
        it.end(2)


def test_a_short_prompt_is_compressed_at_once():
    with conversation("all", piece=len(FIRST)) as it:
        before = seen(it.server, it.req, it.pools)
        assert it.compress()
        with pytest.raises(AssertionError):
            assert_same(seen(it.server, it.req, it.pools), before)
        it.end(2)
