"""Histories without slots: read from host memory, layer by layer, and compressed from there; who holds what then."""

from __future__ import annotations

from array import array

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from keepkv_sglang.runtime import compressor, stream
from keepkv_sglang.runtime.process import current
from tests.runtime.test_originals_contents import KIND, SECOND, first_turn
from tests.support.served import OFF, SYSTEM, serving, text

FIRST = [*SYSTEM, *text(1000, 160)]
NEW = text(3000, 40)
PROMPT = [*FIRST, *text(9000, 4), *NEW]
HOST = {"host_ratio": 4.0, "unpack": 0.01, "references": 0}  # no history has room


def counts():
    return current().counters


def test_history_and_turn_become_one_span_in_fresh_slots():
    with serving(**HOST) as server:
        server.run(FIRST)
        old = {span.serial for span in server.tree.spans.spans()}
        req = server.admit(PROMPT)
        state = server.rt.requests.state_of(req)
        assert req.prefix_len == len(FIRST) + 3 and state.streamed
        assert server.world.prefill(req)
        assert state.offset > 0 and req.kv.kv_committed_len == len(PROMPT) - state.offset, "the row of its match"
        server.world.prefilled(req)
        new = [span for span in server.tree.spans.spans() if span.serial not in old]
        assert new[0].parent is None and new[0].path_tokens > len(FIRST)
        assert all(not span.lock_ref for span in server.tree.spans.spans() if span.serial in old)
        kept = server.rt.config.kept_slots(0, len(PROMPT) - 1 - len(SYSTEM))
        assert req.kv.kv_committed_len == len(SYSTEM) + kept + 1, "as where the history had slots"
        assert not state.streamed and not server.rt.originals.streams
        server.world.finish(req, array("q", text(9000, 4)))
        assert counts().archived_tokens == len(PROMPT) - 1, "each token once"
        assert (counts().streamed, counts().streamed_tokens) == (1, len(FIRST) + 3 - len(SYSTEM))
        assert not counts().unpacked and not counts().unpack_no_room


def test_a_prompt_that_adds_little_computes_raw_tokens_again():
    """So that its window has queries."""
    with serving(**HOST) as server:
        server.run(FIRST, reply=6)
        prompt = [*FIRST, *text(9000, 6), 5]
        assert server.run(prompt) < len(prompt) - 2
        assert counts().streamed == 1 and counts().compressions == 2


def test_a_request_may_be_read_compressed():
    with serving(**HOST) as server:
        server.run(FIRST, kind={"unpack": False})
        server.run(PROMPT, kind={"unpack": False})
        assert not counts().streamed and counts().compressions == 2
    with serving(**HOST, unpack_overflow="view") as server:
        server.run(FIRST)
        server.run(PROMPT)
        assert (counts().streamed, counts().unpack_no_room) == (0, 1)


def test_a_history_that_the_pool_could_not_hold():
    """Longer than all slots, it is streamed still, and nothing is compressed between chunks."""
    with serving(slots=500, host_ratio=6.0, unpack=1.0, references=0) as server:
        prompt = list(FIRST)
        server.run(prompt)
        for turn in range(5):
            prompt += [*text(9000, 4), *text(3000 + 200 * turn, 150)]
            server.run(prompt)
        assert len(prompt) > 900
        assert counts().compressions == 6 and counts().unpacked + counts().streamed == 5
        assert counts().unpacked and counts().streamed >= 3 and not counts().unpack_no_room
        assert counts().archived_tokens == len(prompt) - 1


def test_whoever_ends_early_gives_everything_back():
    with serving(**HOST) as server:
        server.run(FIRST)
        for end in (server.world.abort, server.world.retract):
            req = server.admit(PROMPT)
            assert server.rt.originals.streams
            end(req)
            server.rt.forget_row(req)
            assert not server.rt.originals.streams and not server.rt.originals.index.protected_slots
        req = server.admit(PROMPT)
        assert server.world.prefill(req)
        server.world.abort(req)
        assert not server.rt.originals.streams and not server.rt.originals.index.protected_slots
        server.world.check()


def test_a_request_that_is_not_admitted_has_its_match_again():
    with serving(slots=300, **HOST) as server:
        server.run(FIRST)
        other = server.admit(text(5000, 190), kind=OFF)
        assert server.world.prefill(other)
        taken = server.world.reserved
        server.world.reserved += server.world.free_or_evictable() - 60
        req = Req("late", "", array("q", PROMPT), SamplingParams(max_new_tokens=4))
        assert not server.world.admit(req)
        state = server.rt.requests.state_of(req)
        assert not state.streamed and not server.rt.originals.streams
        assert not server.rt.originals.index.protected_slots
        server.world.reserved = taken
        server.world.abort(other)


def test_without_room_for_the_result_the_history_stays_as_it_is(monkeypatch):
    with serving(**HOST) as server:
        server.run(FIRST)
        req = server.admit(PROMPT)
        assert server.world.prefill(req)
        monkeypatch.setattr(compressor, "allocate", lambda *_: None)
        server.world.prefilled(req)
        state = server.rt.requests.state_of(req)
        assert not state.streamed and not state.plan, "the turn alone is compressed, behind its match"
        assert state.compressions == 1 and not server.rt.originals.streams
        monkeypatch.undo()
        server.world.finish(req, array("q", text(9000, 4)))
        assert counts().mispublished == 0 and counts().skipped_no_room == 1


@pytest.mark.parametrize("codec", ["native", "int8", "int4"])
def test_what_was_computed_is_read(codec):
    """A layer's K and V of the whole prompt: the history's as they were computed, protected tokens bit for bit."""
    with serving(unpack=0.01, host_ratio=1.0, references=0) as server:
        pools, computed = first_turn(server, codec)
        req = server.admit(SECOND, kind=KIND)
        assert server.world.prefill(req)
        state = server.rt.requests.state_of(req)
        assert state.streamed
        exact = [*range(len(SYSTEM)), *range(60, 70), *range(150, 155)]
        lossy = sorted(set(range(len(FIRST) - 1)) - set(exact))
        tail = server.rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len].long()[-40:]
        for begin in (0, len(SYSTEM)):
            reading = stream.reading(server.rt, req, state, begin, len(SECOND))
            for layer in (1, 0):
                for pool, before, read in zip(pools, computed, reading.layer(layer), strict=True):
                    whole = torch.cat([before[layer, :begin], read])
                    assert torch.equal(whole[exact], before[layer, exact])
                    error = (whole[: len(FIRST) - 1] - before[layer, : len(FIRST) - 1])[lossy].abs()
                    assert float(error.max()) <= {"native": 0.0, "int8": 0.02, "int4": 0.35}[codec]
                    assert torch.equal(whole[-40:], pool[layer, tail]), "what is new has slots"
        server.world.prefilled(req)
        assert len(state.uncounted) == 1 and state.merged == 0, "nobody has waited for the numbers"
        state.count_merged()
        kept = req.kv.kv_committed_len - len(SYSTEM) - 1
        assert round(state.merged + state.dropped, 6) == len(SECOND) - 1 - len(SYSTEM) - kept
        server.world.finish(req, array("q", text(9000, 4)))
        assert server.rt.counters.streamed == 1
