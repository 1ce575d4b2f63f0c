"""Originals on the whole cache manager without a model: who gets what back, and what becomes of slots and blocks."""

from __future__ import annotations

from array import array

import pytest
import torch

from keepkv_sglang.memory.originals import BlockLayout
from keepkv_sglang.runtime.process import current
from keepkv_sglang.turn.spans import planned_span
from tests.support.served import OFF, SYSTEM, serving, text

FIRST = [*SYSTEM, *text(1000, 160)]
NEW = text(3000, 40)
HOST = {"host_ratio": 4.0, "unpack": 1.0, "references": 0}


def counts():
    return current().counters


def second(reply=4):
    """The prompt of the turn that follows FIRST."""
    return [*FIRST, *text(9000, reply), *NEW]


def test_a_new_turn_is_read_over_the_whole_history():
    with serving(**HOST) as server:
        server.run(FIRST)
        assert counts().archived_tokens == len(FIRST) - 1 and not counts().unpacked
        old = {span.serial for span in server.tree.spans.spans()}
        req = server.admit(second())
        state = server.rt.requests.state_of(req)
        assert req.prefix_len == len(FIRST) + 3, "all but what the reply's last token would have computed"
        assert server.world.prefill(req)
        assert (state.offset, state.unpacked_tokens) == (0, len(FIRST) + 3 - len(SYSTEM)), "a slot for each token"
        assert server.rt.originals.unpacked_slots == state.unpacked_tokens
        server.world.prefilled(req)
        # The new chain hangs at the anchor, beside the old one.
        new = [span for span in server.tree.spans.spans() if span.serial not in old]
        assert new[0].parent is None and new[0].path_tokens > len(FIRST)
        assert all(not span.lock_ref for span in server.tree.spans.spans() if span.serial in old)
        kept = server.rt.config.kept_slots(0, len(second()) - 1 - len(SYSTEM))
        assert req.kv.kv_committed_len == len(SYSTEM) + kept + 1, "history and turn together, at the budget"
        assert server.rt.originals.unpacked_slots == 0
        server.world.finish(req, array("q", text(9000, 4)))
        assert counts().archived_tokens == len(second()) - 1, "each token once"


def test_a_twin_takes_what_is_compressed():
    with serving(**HOST) as server:
        server.run(FIRST)
        assert server.run(FIRST) == len(FIRST) - 1
        assert not counts().unpacked


def test_a_window_is_computed_in_any_case():
    with serving(**HOST) as server:
        server.run(FIRST)
        prompt = [*FIRST, *text(9000, 4), 5]
        assert server.run(prompt) == len(prompt) - 1 - 4
        assert counts().unpacked == 1 and counts().compressions == 2


def test_a_history_shorter_than_the_queries_is_computed_again():
    """Behind the system prompt, which nothing was merged into."""
    with serving(**HOST | {"references": 300}) as server:
        server.run(FIRST)
        assert server.run(second()) == len(SYSTEM)
        assert (counts().unpacked, counts().compressions) == (0, 2)
        assert counts().archived_tokens == len(second()) - 1


def test_a_short_turn_stays_whole():
    """Below min_tokens nothing is compressed, here only the history before it."""
    with serving(**HOST | {"min_tokens": 50}) as server:
        server.run(FIRST)
        req = server.admit(second())
        assert server.world.prefill(req)
        server.world.prefilled(req)
        kept, new = server.rt.config.kept_slots(0, len(FIRST) - 1 - len(SYSTEM)), 4 + len(NEW)  # the reply too
        assert req.kv.kv_committed_len == len(SYSTEM) + kept + new + 1
        assert server.rt.requests.state_of(req).carried == new
        server.world.finish(req, array("q", text(9000, 4)))


def test_a_short_turn_that_is_protected_takes_its_slots_once():
    prompt = second()
    first = len(prompt) - len(NEW)
    with serving(**HOST | {"min_tokens": 50}, protect=f"{first}-{len(prompt) - 1}") as server:
        server.run(FIRST)
        req = server.admit(prompt)
        assert server.world.prefill(req)
        state = server.rt.requests.state_of(req)
        span = planned_span(state, state.plan[0], req.kv.kv_committed_len)
        kept = server.rt.config.kept_slots(0, len(FIRST) - 1 - len(SYSTEM))
        assert span.m == kept + 4 + len(NEW) and span.policy.whole_tokens == len(NEW) - 1
        assert span.policy.carried == 4 + len(NEW) - span.policy.whole_tokens <= span.policy.free
        server.world.prefilled(req)
        server.world.finish(req, array("q", text(9000, 4)))


@pytest.mark.parametrize("kind", [{"unpack": False}, {"unpack": 0}])
def test_a_request_may_do_without(kind):
    with serving(**HOST) as server:
        server.run(FIRST, kind=kind)
        server.run(second(), kind=kind)
        assert not counts().unpacked and counts().archived_tokens == len(second()) - 1


def test_what_finds_no_slots_is_read_compressed():
    with serving(**{**HOST, "unpack": 0.25}, unpack_overflow="view") as server:
        server.run(FIRST)
        server.run(second())
        assert (counts().unpacked, counts().unpack_no_room) == (0, 1)
    with serving(slots=260, **HOST, unpack_overflow="view") as server:
        server.run(FIRST)
        other = server.admit(text(5000, 60), kind=OFF)
        assert server.world.prefill(other)
        req = server.admit(second(), reply=1)
        assert (req.prefix_len, req.host_hit_length) == (len(FIRST) + 3, 0)
        assert (counts().unpacked, counts().unpack_no_room) == (0, 0)
        server.world.abort(req)
        server.world.abort(other)


def test_a_conversation_comes_back_after_its_spans_were_evicted():
    with serving(**HOST) as server:
        server.run(FIRST)
        server.tree.evict_slots(600)
        assert not len(server.tree.spans) and server.rt.originals.tokens == len(FIRST) - 1
        assert server.run(second()) == len(FIRST) - 1
        assert counts().unpacked_tokens == len(FIRST) - 1, "the system prompt too"
        assert not server.tree.is_root(server.tree.match_core(array("q", SYSTEM), (None, None, None)).last_device_node)


def test_the_first_half_of_a_turn_is_shared():
    with serving(**HOST) as server:
        server.run(FIRST)
        assert server.run([*FIRST[:150], *text(7000, 60)]) == 128, "whole blocks"
        assert server.cached([*FIRST[:150], *text(8000, 60)], kind={"unpack": False}) == len(SYSTEM)


def test_originals_of_another_tenant_or_text_are_not_found():
    with serving(**HOST) as server:
        server.run(FIRST)
        server.tree.evict_slots(600)
        assert server.cached([1, *FIRST[1:], *NEW]) == 0
        assert server.cached([*FIRST, *NEW], kind={"budget": 0.5}) == 0, "other settings"


def test_a_full_archive_gives_up_the_oldest_and_says_what_is_missing():
    with serving(host_ratio=0.5, unpack=1.0, references=0) as server:  # 5 blocks
        server.run(FIRST)  # 4 of them
        server.run([*SYSTEM, *text(2000, 160)])
        assert counts().archive_full_tokens == 0
        server.run(second())
        assert (counts().unpacked, counts().unpack_incomplete) == (0, 1)
        assert counts().archive_gaps == 1, "nothing is archived behind a gap"


def test_an_archive_of_one_block_changes_nothing():
    with serving(host_ratio=0.1, unpack=1.0, references=0) as server:
        server.run(FIRST)
        assert (counts().archived_tokens, counts().archive_full_tokens) == (64, len(FIRST) - 65)
        assert server.run(second()) == len(FIRST) + 3
        assert not counts().unpacked


def test_whoever_ends_before_its_row_gives_everything_back():
    with serving(**HOST) as server:
        server.run(FIRST)
        for end in (server.world.abort, server.world.retract):
            req = server.admit(second())
            assert server.rt.originals.unpacking
            end(req)
            server.rt.forget_row(req)
            assert not server.rt.originals.unpacking and not server.rt.originals.unpacked_slots
            assert not server.rt.originals.index.protected_slots
        server.world.check()


def test_a_retracted_request_goes_on():
    with serving(**HOST) as server:
        server.run(FIRST)
        req = server.admit(second(), reply=40)
        assert server.world.prefill(req)
        server.world.prefilled(req)
        req.output_ids.append(9000)
        server.world.retract(req)
        server.tree.check()
        assert server.rt.originals.unpacked_slots == 0 and not server.rt.originals.index.protected_slots


def test_a_flush_forgets_them():
    with serving(**HOST) as server:
        server.run(FIRST)
        server.world.allocator.clear()
        server.world.rows.clear()
        server.tree.reset()
        assert server.rt.originals.tokens == 0
        assert server.rt.originals.store.free_blocks == server.rt.originals.store.blocks
        assert server.cached(second()) == 0


def test_a_budget_in_slots():
    with serving(budget=40, **HOST) as server:
        server.run(FIRST)
        req = server.admit(second())
        assert server.world.prefill(req)
        server.world.prefilled(req)
        assert req.kv.kv_committed_len == len(SYSTEM) + 40 + 1
        server.world.finish(req, array("q", text(9000, 4)))
        assert counts().unpacked == 1


def test_an_error_while_archiving_costs_the_originals_only(monkeypatch, caplog):
    with serving(**HOST) as server:
        monkeypatch.setattr(server.rt.originals.store, "write", lambda *_: 1 / 0)
        server.run(FIRST)
        assert counts().compressions == 1 and not server.rt.originals.tokens
        assert server.run(second()) == len(FIRST) + 3
    assert "archive failed" in caplog.text


def test_what_others_read_comes_back_only_as_they_compute_it():
    """The first message goes into SGLang's tree, which requests of all settings read: no int4 in there."""
    with serving(**HOST) as server:
        server.run(FIRST)
        server.tree.evict_slots(600)
        server.rt.originals.store.layout = BlockLayout("int4", 1, 2, 2, torch.float32)
        assert server.run(second()) == 0
        assert (counts().unpacked, counts().unpack_incomplete) == (0, 1)
        assert server.run([*second(), *text(9000, 4), *text(4000, 40)]) > len(FIRST) and counts().unpacked == 1


def test_what_attended_to_merged_tokens_is_known_to_have():
    """Prompts behind replies that were computed on a compressed row: not what another request would compute."""
    with serving(**HOST) as server:
        server.run(FIRST, reply=40)
        server.run([*FIRST, *text(9000, 40), *NEW])
        originals, prompt = server.rt.originals, array("q", [*FIRST, *text(9000, 40), *NEW])
        last = next(span for span in originals.index.spans() if span.path_tokens == len(prompt) - 1)
        assert originals.pure(last, len(FIRST) - 1) and not originals.pure(last, len(FIRST) + 20)


def test_an_error_while_unpacking_leaves_the_compressed_match(monkeypatch, caplog):
    with serving(**HOST) as server:
        server.run(FIRST)
        monkeypatch.setattr(server.rt.originals.store, "read", lambda *_: 1 / 0)
        assert server.run(second()) == len(FIRST) + 3
        assert (counts().unpacked, counts().unpack_no_room) == (0, 1)
        assert not server.rt.originals.unpacked_slots and not server.rt.originals.index.protected_slots
    assert "unpack failed" in caplog.text


def test_no_block_is_free_where_all_are_held(caplog):
    with serving(host_ratio=0.3, unpack=1.0, references=0) as server:  # 3 blocks, which the first one holds
        first = server.admit(FIRST)
        assert server.world.prefill(first)
        server.world.prefilled(first)
        server.run([*SYSTEM, *text(2000, 160)])
        assert counts().archive_full_tokens == len(FIRST) - 1 - 3 * 64 + len(FIRST) - 1
        server.world.finish(first, array("q", text(9000, 4)))
    assert "failed" not in caplog.text


def test_a_history_is_not_unpacked_for_want_of_queries():
    with serving(**HOST) as server:
        server.run(FIRST)
        taken = server.rt.arena.take(server.rt.arena.free_rows)
        server.run(second())
        server.rt.arena.give_back(taken)
        assert not counts().unpacked
