"""What `protect` and `fair` promise: texts, positions, keys, selections and budgets. On a live server: tests/server."""

from __future__ import annotations

import math
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.rules import RULES
from keepkv_sglang.compress.select import SpanPolicy, select
from keepkv_sglang.kernels.merge import reference
from keepkv_sglang.radix.marks import WHOLE_MARK, marked, plain
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig
from keepkv_sglang.settings.protect import MAX_RANGES
from keepkv_sglang.turn.anchor import MessageBorder
from keepkv_sglang.turn.protection import Protection
from keepkv_sglang.turn.state import RequestState
from tests.support.layers import policy, random_layer

ON = KeepKVConfig(enabled=True)


# Texts


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("", ""), (" ", ""), ("system", "system"), ("0-5", "0-5"), (" 7-9, 0-5,system ", "system,0-5,7-9"),
     ("5-9,0-5", "0-9"), ("0-05", "0-5"), ("system,system", "system")],
)  # fmt: skip
def test_equal_protections_are_one_text(text, canonical):
    config = ON.with_request({"protect": text})
    assert config.protect == canonical and config.with_request({"protect": canonical}) == config


def test_neighbouring_instructions_stay_two():
    assert ON.with_request({"fair": "5-9, 0-5"}).fair == "0-5,5-9"


@pytest.mark.parametrize(
    ("value", "message"),
    [("5-5", "empty"), ("9-5", "empty"), ("0-999999999", "too far out"), ("x", "start-end"), ("0-5,", "start-end"),
     ("-5", "start-end"), ("5-", "start-end"), ("1.5-3", "start-end"), ("0-5-9", "start-end"), ("٣-٥", "start-end"),
     ("0-5,4-9", "0-5 and 4-9 overlap"), ("0-9,2-3", "overlap"), (["0-5"], "not text"), (5, "not text"),
     (None, "not text"), (True, "not text"), ("9" * 3000, "start-end"),
     (",".join(f"{2 * i}-{2 * i + 1}" for i in range(MAX_RANGES + 1)), f"at most {MAX_RANGES}")],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize("key", ["protect", "fair"])
def test_bad_texts_say_what_to_do(key, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        ON.with_request({key: value})
    assert key in str(error.value) and len(str(error.value)) < 300


def test_fair_needs_a_fraction_and_ranges():
    with pytest.raises(ConfigError, match=r"fair needs a budget that is a fraction.*or leave out fair"):
        ON.with_request({"fair": "0-5", "budget": 40})
    with pytest.raises(ConfigError, match="use protect for that"):
        ON.with_request({"fair": "system"})
    server = KeepKVConfig(enabled=True, fair="0-5", protect="0-9")
    assert server.with_request({"fair": "", "budget": 40, "protect": ""}).counts_slots


# Positions and keys


def test_system_is_the_first_message_when_a_second_follows():
    border, prompt = MessageBorder(2, 3), array("q", [7, 7, 7, 2, 7, 7, 7, 7, 7, 2, 7, 7, 7])
    assert Protection.of("system", "", prompt, border).whole == ((0, 4),)
    assert Protection.of("system,2-6,9-10", "", prompt, border).whole == ((0, 6), (9, 10))
    assert Protection.of("system", "", prompt[:7], border).whole == (), "the first message is also the last"
    assert Protection.of("system,1-2", "", prompt, None).whole == ((1, 2),)


def test_parts_of_a_span():
    p = Protection(whole=((0, 10), (20, 30)), fair=((5, 25), (25, 60)))
    assert p.count(5, 25) == 10 and p.count(0, 1000) == 20 and p.count(10, 20) == 0
    assert p.whole_in(5, 25) == ((0, 5), (15, 20)) and p.whole_in(10, 20) == ()
    # 10 of [5, 25) are not whole in [5, 30); 5 of [25, 30) are, all of them
    assert p.shares_in(5, 30, 0.25) == ((0, 20, 3), (20, 25, 0))
    assert p.shares_in(30, 100, 0.1) == ((0, 30, 3),), "0.1 * 30 is 3"
    assert p.touches(59, 99) and not p.touches(60, 99) and not Protection().touches(0, 99)


def test_a_key_shows_what_is_marked_in_it_and_nothing_else():
    tokens = array("q", range(100, 140))
    early, late = Protection(whole=((0, 5),)), Protection(whole=((0, 5), (30, 35)))
    assert early.keyed(tokens)[:30] == late.keyed(tokens)[:30]
    keys = [p.keyed(tokens) for p in (early, late, Protection(), Protection(fair=((0, 5),)))]
    keys += [Protection(fair=((0, 3), (3, 5))).keyed(tokens), Protection(whole=((0, 5),), fair=((0, 5),)).keyed(tokens)]
    assert len({key.tobytes() for key in keys}) == len(keys)
    assert all(plain(key) == tokens and min(key) >= 0 for key in keys)
    assert [marked(key) for key in keys] == [True, True, False, True, True, True]
    assert Protection(whole=((40, 50),)).keyed(tokens) is tokens is plain(tokens)
    assert early.keyed(tokens)[4:6] == array("q", [104 | WHOLE_MARK, 105])
    assert not marked(array("q"))
    assert ON.with_request({"protect": "0-5", "fair": "6-9"}).fingerprint() == ON.fingerprint(), "tokens carry it"


# Budgets


def state(budget=0.1, prompt=1001, **config) -> RequestState:
    protection = Protection.of(config.get("protect", ""), config.get("fair", ""), array("q"), None)
    return RequestState(KeepKVConfig(enabled=True, budget=budget, **config), (), prompt, protection)


def test_protected_tokens_come_on_top():
    assert state(protect="0-500").slots_for(0, 1000) == 500 + 50
    assert state(protect="0-1000").slots_for(0, 1000) > 1000, "nothing to compress: the span stays raw"
    assert state(protect="900-2000").slots_for(0, 1000) == 100 + 90
    assert state(40, protect="900-1100").slots_for(0, 1000) == 100 + 40
    reply = state(protect="1000-1010", interval=64)  # the reply begins at 1000
    assert [reply.slots_for(1000 + at, 1064 + at) for at in (0, 64)] == [10 + 6, 6], "ceil(5.4), then ceil(11.8) - 6"
    assert reply.reply_growth(1000) == 100 + 64 + 10
    reply.move_tail(90, 990, 10)  # 10 recent tokens came in with a slot each; they are counted
    assert reply.slots_for(990, 1064) == 10 + 10 + 6
    reply.move_tail(100, 1050, 14)
    assert reply.slots_for(1050, 1128) == 14 + 6, "as without recent tokens from 1064 on, and a slot for each of them"


def test_shares_are_inside_the_budget():
    assert state(fair="0-100,100-400").slots_for(0, 1000) == 100
    assert state(fair=",".join(f"{9 * i}-{9 * i + 9}" for i in range(60)), sinks=0).slots_for(0, 541) == 60
    assert state(fair="0-1000", sinks=4).slots_for(0, 1000) == 104


def test_slots_of_a_chain_that_is_merged_again():
    s = state(40, protect="10-20,90-95,200-210")
    assert s.protected_in(100, 0, 100) == ((10, 20), (90, 95))
    s.merged_tokens = 100  # 15 + 40 slots stand for [0, 100), protected ones first; 120 raw ones follow
    assert s.protected_in(175, 0, 220) == ((0, 15), (155, 165))
    assert state(protect="110-120").protected_in(50, 100, 150) == ((10, 20),)


# Selections


@st.composite
def cases(draw):
    """(scores, policy): up to three whole ranges, up to three shares, a budget that holds them."""
    n = draw(st.integers(2, 60))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=6, unique=True)))
    whole = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=6, unique=True)))
    fraction, sinks = draw(st.floats(0.01, 0.9)), draw(st.integers(0, 3))
    shares = Protection(whole, tuple(zip(cuts[::2], cuts[1::2], strict=False))).shares_in(0, n, fraction)
    taken = sum(b - a for a, b in whole)
    owed = sum(least for _, _, least in shares) + (sinks if shares else 0)
    least = taken + max(1, owed)
    if least > n - 1:
        whole, shares, least = (), (), 1
    seed, levels = draw(st.integers(0, 1 << 20)), draw(st.sampled_from([2, 1000]))
    scores = torch.randint(0, levels, (3, n), generator=torch.Generator().manual_seed(seed)).double()
    if draw(st.booleans()):
        scores[:, n // 2 :] = -math.inf  # tokens that no query sees
    p = SpanPolicy(draw(st.integers(least, n - 1)), "mean", draw(st.integers(0, 8)), sinks, 0.5,
                   chunk=draw(st.sampled_from([1, 1, 3])), whole=whole, shares=shares)  # fmt: skip
    return scores, p


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_head_keeps_what_is_whole_and_what_is_owed(case):
    scores, p = case
    kept, absorbs = select(scores, p)
    whole = [i for a, b in p.whole for i in range(a, b)]
    for h in range(3):
        mine = kept[h].tolist()
        assert (
            len(set(mine)) == p.m
            and mine[: len(whole)] == whole
            and mine[len(whole) :] == sorted(set(mine) - set(whole))
        )
        assert not absorbs[h, : len(whole)].any()
        for a, b, least in p.shares:
            assert sum(a <= i < b and i not in whole for i in mine) >= least
    expected = reference.select(scores, p)
    assert torch.equal(kept, expected[0]) and torch.equal(absorbs, expected[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_whole_tokens_are_bit_identical_and_the_rest_equals_the_reference(rule, dtype):
    """Also with a threshold that lets everything merge: nothing joins a whole token."""
    x = random_layer(60, 4, ctx=3, group=2, dtype=dtype, lv_dtype=torch.float32)
    p = SpanPolicy(30, rule, 6, 2, -1.0, whole=((0, 3), (20, 31)), shares=((25, 40, 4), (40, 50, 3)))
    r = compress_layer(x, p)
    whole = torch.tensor([*range(3), *range(20, 31)])
    for got, stored in ((r.k, x.k), (r.v, x.v), (r.lv, x.lv)):
        assert torch.equal(got[:14], stored[whole])
    assert all(torch.bincount(r.assign[h][r.assign[h] >= 0], minlength=30)[:14].max() == 1 for h in range(2))
    if dtype == torch.float64:
        expected = reference.compress(x, p)
        assert torch.equal(r.kept, expected[0]) and torch.equal(r.assign, expected[1])
        torch.testing.assert_close(r.k, expected[2])


def test_without_shares_one_instruction_starves_another():
    """What "The Pitfalls of KV Cache Compression" describes, in small."""
    scores = torch.cat((torch.full((2, 20), 1.0), torch.full((2, 20), 5.0)), 1).double()
    p = SpanPolicy(8, "evict", 0, 0, 0.6)
    assert (select(scores, p)[0] >= 20).all()
    fair = SpanPolicy(8, "evict", 0, 0, 0.6, shares=((0, 20, 4), (20, 40, 4)))
    assert (select(scores, fair)[0] < 20).sum(1).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"whole": ((0, 8),)}, "leave none of the 8"), ({"whole": ((4, 2),)}, "ascending"),
     ({"whole": ((0, 3), (2, 4))}, "apart"), ({"whole": ((30, 41),)}, "inside"), ({"shares": ((0, 3, 4),)}, "no more"),
     ({"shares": ((0, 6, 6),), "sinks": 3}, "do not fit"), ({"whole": ((0, 2),), "shares": ((0, 3, 2),)}, "no more")],
    ids=str,
)  # fmt: skip
def test_impossible_policies_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        compress_layer(random_layer(40), policy(8, **{"recent": 0, "sinks": 0, **changes}))
