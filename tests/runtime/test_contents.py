"""What the cache's slots hold is checked against both trees (KEEPKV_CHECK=1): each kind of damage is noticed."""

from __future__ import annotations

from array import array

import pytest
import torch

from keepkv_sglang.memory.votes import SlotTokens
from keepkv_sglang.runtime.contents import check_contents
from tests.runtime.test_originals_contents import FIRST, SLOTS, give_contents
from tests.support.served import OFF, serving, text

WHOLE = text(5000, 40)  # of a request without KeepKV


def written_again(rt):
    """As the forward does that writes a slot; here all that are free, since there is no model."""
    slots = rt.allocator.get_all_free_pages().long()
    for layer in range(len(rt.votes.log_votes)):
        rt.votes.reset(layer, slots)
    rt.cells.reset(slots)
    rt.slot_tokens.forget(slots)


@pytest.fixture
def server():
    """A cache with a compressed prompt, its raw reply, and an uncompressed prompt."""
    with serving() as server:
        give_contents(server, "native")
        rt = server.rt
        rt.slot_tokens = SlotTokens(SLOTS + 1)
        for prompt, kind in ((FIRST, None), (WHOLE, OFF)):
            req = server.admit(prompt, kind=kind)
            assert server.world.prefill(req)
            row = rt.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(prompt)].long()
            rt.slot_tokens.write(row, torch.tensor(prompt))
            server.world.prefilled(req)
            written_again(rt)
            server.world.finish(req, array("q", text(9000, 4)))
            if kind is None:
                reply = span_of(server, raw=True)
                rt.slot_tokens.write(reply.slots, torch.tensor(reply.tokens))
        spans = list(rt.tree.spans.spans())
        assert {span.raw for span in spans} == {True, False}
        check_contents(rt)
        yield server
        rt.slot_tokens = None


def span_of(server, raw):
    """A compressed one, or the last raw one: that before it was left raw by a compression."""
    return next(span for span in reversed(list(server.rt.tree.spans.spans())) if span.raw is raw)


def whole_slots(server):
    return server.rt.tree.tree_core.all_values_flatten().long()


@pytest.mark.parametrize("where", [lambda server: span_of(server, raw=True).slots, whole_slots], ids=["span", "node"])
def test_a_slot_of_one_token(server, where):
    rt, slot = server.rt, where(server)[:1]
    rt.votes.log_votes[1][slot, 0] = 0.7
    with pytest.raises(AssertionError, match="I10: a slot of one token has other votes in layer 1"):
        check_contents(rt)
    rt.votes.log_votes[1][slot, 0] = 0
    rt.cells.span_of[slot] = 3
    with pytest.raises(AssertionError, match="I10: a slot of one token is part of a packed span"):
        check_contents(rt)
    rt.cells.span_of[slot] = 0
    rt.slot_tokens.write(slot, torch.tensor([7]))
    with pytest.raises(AssertionError, match=r"I10: a slot of .* holds another token"):
        check_contents(rt)


def test_a_slot_of_a_packed_span_that_was_written_again(server):
    slots = span_of(server, raw=False).slots
    assert bool(server.rt.cells.span_of[slots].all()), "packed"
    server.rt.cells.reset(slots[:1])
    with pytest.raises(AssertionError, match="have other slots"):
        check_contents(server.rt)
