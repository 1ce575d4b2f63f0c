"""Which prefix is shared, kept and given up: the adapter over SGLang's tree and ours, without a model."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest

from keepkv_sglang.radix.invariants import check_slots
from keepkv_sglang.runtime import pressure
from keepkv_sglang.tools.simulate.traces import BORDER
from tests.support.served import OFF, SYSTEM, Server, serving, text


@pytest.fixture
def server(request) -> Iterator[Server]:
    with serving(**{"pressure": "merge", "pressure_free": 0.5, **getattr(request, "param", {})}) as server:
        yield server


def test_only_the_anchor_of_a_compressed_request_is_published_uncompressed(server):
    prompt = [*SYSTEM, *text(200, 100), BORDER, *text(400, 5)]
    assert server.run(prompt) == 0
    assert server.tree.nodes.get(server.tree.path_of(next(server.tree.spans.spans()).anchor)[-1].node_id).end == 41
    assert server.tree.tree_core.total_size()[0] == 41
    assert server.cached(prompt, OFF) == 41
    assert server.cached(prompt) == len(prompt) - 1
    assert server.run([*SYSTEM, *text(300, 100), BORDER]) == 41, "another conversation shares the anchor"
    assert {span.anchor_len for span in server.tree.spans.spans()} == {41}


def test_sglangs_own_splits_do_not_move_an_anchor(server):
    prompt = [*SYSTEM, *text(200, 100), BORDER, *text(400, 5)]
    server.run(prompt)
    for shared in (10, 40, 1, 25):  # each cuts the anchor's node once more
        server.run([*SYSTEM[:shared], *text(500 + 50 * shared, 20)], kind=OFF)
    assert len(server.tree.path_of(next(server.tree.spans.spans()).anchor)) == 5
    assert server.cached(prompt) == len(prompt) - 1


def test_an_uncompressed_copy_goes_before_older_entries_of_others(server):
    old, both = text(1000, 100), text(2000, 120)
    server.run(old)
    server.run(both)
    assert server.run(both, kind=OFF) == 0  # the same tokens once more, uncompressed, and the youngest of all
    uncompressed = server.tree.tree_core.total_size()[0]
    assert uncompressed >= 120
    server.tree.evict_slots(100)
    assert server.tree.tree_core.total_size()[0] < uncompressed - 90
    assert server.cached(old) == 99 and server.cached(both) == 119, "no entry was given up"


def test_a_copy_made_before_the_entry_goes_first_as_well(server):
    old, both = text(1000, 100), text(2000, 120)
    server.run(old)
    req = server.admit(both)  # finds nothing uncompressed: it will be compressed from the start
    assert server.world.prefill(req)
    server.run(both, kind=OFF)
    server.world.prefilled(req)
    server.world.finish(req, array("q", text(9000, 4)))
    server.tree.evict_slots(100)
    assert server.cached(old) == 99 and server.cached(both) == 119


def test_an_anchor_is_never_a_copy_to_be_given_up(server):
    whole = [*SYSTEM, *text(200, 60)]  # a first message of its own: no border follows, all of it is one entry
    server.run([*SYSTEM[:-1], *text(200, 60)])
    server.run([*SYSTEM, *text(300, 60), BORDER, *text(400, 9)])
    server.run(whole, kind=OFF)
    server.tree.evict_slots(20)
    server.tree.check()
    assert server.cached([*SYSTEM, *text(300, 60), BORDER, *text(400, 9)]) == 41 + 61 + 9 - 1


def test_entries_go_before_their_anchor_and_an_anchor_takes_them_along(server):
    prompts = [[*SYSTEM, *text(1000 * n, 80), BORDER, *text(70, 5)] for n in (1, 2, 3)]
    for prompt in prompts:
        server.run(prompt)
    server.tree.evict_slots(1)
    assert [server.cached(prompt) for prompt in prompts] in ([41, 126, 126], [126, 126, 126])
    assert server.tree.spans.has_anchor(next(server.tree.spans.spans()).anchor)
    server.tree.evict_slots(600)
    assert not len(server.tree.spans) and server.tree.tree_core.total_size()[0] == 0


@pytest.mark.parametrize("server", [{"pressure_tokens": 64}, {"pressure_tokens": 4096}], indirect=True)
def test_a_cold_anchor_is_merged_and_its_entries_live_on_below_it(server, monkeypatch):
    prompt = [*text(3000, 100), BORDER, *text(200, 100), BORDER, *text(400, 5)]
    server.run(prompt)
    monkeypatch.setattr(pressure, "is_cold", lambda spans, last_access: True)
    monkeypatch.setattr(pressure, "merge_unused", lambda *args: None)
    server.rt.scheduler.waiting_queue = [type("Waiting", (), {"origin_input_ids": range(500)})]
    for _ in range(4):
        before = server.rt.counters.pressure_tokens
        pressure.relieve(server.rt)
        assert server.rt.counters.pressure_tokens - before <= server.rt.config.pressure_tokens
        server.tree.check()
    assert server.tree.tree_core.total_size()[0] == 0, "nothing is left uncompressed in SGLang's tree"
    assert server.rt.counters.pressure_tokens == 101
    assert server.cached(prompt) == len(prompt) - 1
    assert server.cached(prompt, OFF) == 0, "a request without KeepKV never sees a merged slot"
    assert server.run([*text(3000, 100), BORDER, *text(700, 50), BORDER]) == 101, "shared while compressed"
    chain = max(server.tree.spans.spans(), key=lambda span: span.path_tokens)
    assert chain.anchor is None and chain.path_slots < chain.path_tokens / 2


def test_a_locked_or_hot_prefix_is_not_merged(server, monkeypatch):
    monkeypatch.setattr(pressure, "merge_unused", lambda *args: None)
    server.rt.scheduler.waiting_queue = [type("Waiting", (), {"origin_input_ids": range(600)})]
    prompt = [*text(3000, 100), BORDER, *text(200, 60), BORDER]
    server.run(prompt)
    for n in range(6):
        server.run([*text(3000, 100), BORDER, *text(5000 + 100 * n, 30), BORDER])
        pressure.relieve(server.rt)
    assert not server.rt.counters.pressure_merges, "every request used it"
    monkeypatch.setattr(pressure, "is_cold", lambda spans, last_access: True)
    req = server.admit(prompt)
    pressure.relieve(server.rt)
    assert not server.rt.counters.pressure_merges, "it is locked"
    server.world.abort(req)
    pressure.relieve(server.rt)
    assert server.rt.counters.pressure_merges == 1


def test_a_protected_prefix_is_neither_merged_nor_found_merged(server, monkeypatch):
    system, protect = [*text(3000, 100), BORDER], {"protect": "system"}
    prompt = [*system, *text(200, 100), BORDER, *text(400, 5)]
    monkeypatch.setattr(pressure, "is_cold", lambda spans, last_access: True)
    monkeypatch.setattr(pressure, "merge_unused", lambda *args: None)
    server.rt.scheduler.waiting_queue = [type("Waiting", (), {"origin_input_ids": range(600)})]
    server.run(prompt)
    pressure.relieve(server.rt)
    assert server.rt.counters.pressure_tokens == 101
    assert server.cached(prompt) == len(prompt) - 1
    assert server.run(prompt, kind=protect) == 0, "its first message is there, but merged"
    assert server.cached(prompt, protect) == len(prompt) - 1
    pressure.relieve(server.rt)
    assert server.rt.counters.pressure_tokens == 101, "what it left behind is not merged"
    assert server.cached(prompt, protect) == len(prompt) - 1
    assert server.cached([*system, 1], OFF) == 101, "it lies uncompressed in SGLang's tree"


def test_turns_share_what_they_mark_alike(server):
    prompt = [*SYSTEM, *text(200, 100), BORDER, *text(400, 5)]
    server.run(prompt, kind={"protect": "60-70"})
    longer = [*prompt, *text(9000, 4)[:3], *text(600, 40), BORDER]
    assert server.cached(longer, {"protect": "60-70"}) >= len(prompt) - 1
    assert server.cached(longer, {"protect": "0-20,60-70,160-170"}) >= len(prompt) - 1, "the anchor is whole anyway"
    for other in ({}, {"protect": "60-71"}, {"fair": "60-70"}, {"protect": "60-70", "fair": "100-110"}):
        assert server.cached(longer, other or None) == len(SYSTEM), other
    server.run(longer, kind={"protect": "60-70,160-170"})
    assert server.cached(longer, {"protect": "60-70,160-170"}) == len(longer) - 1
    assert len(prompt) - 1 <= server.cached(longer, {"protect": "60-70"}) < 160


def test_a_raw_span_with_protected_tokens_stays_raw(server, monkeypatch):
    """Turns below min_tokens are raw; those without marks would be merged."""
    monkeypatch.setattr(pressure, "MOST_LOOKED_AT", 50)
    server.run([*SYSTEM, *text(200, 6)], reply=1, kind={"protect": "42-45"})
    server.run([*SYSTEM, *text(300, 6)], reply=1)
    marks = [span for span in server.tree.spans.spans() if span.raw and max(span.tokens) > 1 << 32]
    assert marks and all(span.serial not in server.tree.book.raw for span in marks)
    assert server.tree.book.raw, "the other's is queued"


def test_turns_of_one_token_do_not_grow_a_chain(server):
    """Each is too short to be compressed; what a request that parts at any of them finds is as before."""
    prompt = [*SYSTEM, *text(200, 20), BORDER, 5]
    ends = []
    for turn in range(40):
        assert server.run(prompt, reply=2) == (ends[-1] if ends else 0)
        ends.append(len(prompt) + 1)
        prompt = [*prompt, 9000, 2000 + turn]
    last = max(server.tree.spans.spans(), key=lambda span: span.path_tokens)
    assert len(last.path()) == 4 and last.borders, "the compressed turn, what it left raw, two joined spans"
    assert len(server.tree.book.raw) <= 3
    for end in ends[::-3]:
        assert server.cached([*prompt[:end], 7, 7]) == end
        assert server.run([*prompt[:end], 8, 8], reply=2) == end
    assert server.cached(prompt) == ends[-1]


def test_check_slots_notices_every_kind_of_damage():
    check_slots(4, {"free": [1, 2], "tree": [3], "spans": [4]})
    for owners, words in (
        ({"free": [1, 2], "tree": [3]}, "1 of 4 slots have no owner"),
        ({"free": [1, 2], "tree": [3, 2], "spans": [4]}, "slot 2 belongs to tree and to free"),
        ({"free": [1, 2, 3], "spans": [4, 5]}, "spans holds slot 5"),
        ({"free": [0, 1, 2, 3], "spans": [4]}, "free holds slot 0"),
    ):
        with pytest.raises(AssertionError, match=words):
            check_slots(4, owners)
