"""Compressed requests against a float64 replay of the server's recorded selections (replay.py).

max |dlogprob| <= 1e-4 over 64 tokens. The server computes in float32: a forward pass of this model alone differs from
float64 by about 2e-5, so the bound leaves a factor of five; a wrong vote, position or cluster shows as 1e-2 and more.

The fit of attention_matching amplifies: relative noise of 1e-5 on float64 queries, keys and values moves
log-probabilities by up to 7e-4, with and without reference queries (docs/log.md). There the bound is 3e-3; the formulas
themselves agree to 1e-9 (tests/compress).
"""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.kernels.merge import reference
from keepkv_sglang.kernels.score import reference as reference_scores
from keepkv_sglang.settings.config import MERGE_RULES, KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.evaluate.methods import compress_with, slots_of
from keepkv_sglang.tools.evaluate.probe import Probe
from tests.support.client import flush, generate, numbers
from tests.support.replay import Replay, events_of
from tests.support.replayed import BOUND, BOUND_FITTED, FLAGS, STRICT_RULE, compressed, next_turn, worst

pytestmark = pytest.mark.server

MODES = {
    "overlap": (),
    "no_overlap_chunked_mixed": (
        "--disable-overlap-schedule",
        "--chunked-prefill-size",
        "96",
        "--enable-mixed-chunk",
    ),
}


@pytest.fixture(scope="module", params=MODES, ids=str)
def server(request, launch, record):
    return launch(*FLAGS, *MODES[request.param], "--keepkv-record", str(record))


@pytest.fixture(scope="module")
def prompt(text_tokens) -> list[int]:
    return text_tokens[100:400]


@pytest.fixture(scope="module")
def prefilled(oracle, prompt) -> tuple[Replay, torch.Tensor]:
    row = oracle.clone()
    return row, row.feed(prompt)[-1]


with_overlap = pytest.mark.parametrize("server", ["overlap"], indirect=True, scope="module")


@with_overlap
@pytest.mark.parametrize("rule", MERGE_RULES)
def test_every_rule(server, record, prompt, prefilled, rule):
    """Prompt and reply, without reference queries, as published."""
    bound = BOUND_FITTED if rule == "attention_matching" else BOUND
    compressed(server, record, prompt, prefilled, {"merge": rule, "references": 0}, bound)


@pytest.mark.parametrize("heads", ["uniform", "all"])
def test_default_and_the_next_turn(server, record, prompt, prefilled, text_tokens, heads):
    params = {"merge": "attention_matching", "references": 256, "heads": heads}
    next_turn(server, record, prompt, prefilled, text_tokens, params, BOUND_FITTED)


@with_overlap
@pytest.mark.parametrize("heads", ["layer", "all"])
def test_strict_rule_and_the_next_turn(server, record, prompt, prefilled, text_tokens, heads):
    next_turn(server, record, prompt, prefilled, text_tokens, {**STRICT_RULE, "heads": heads}, BOUND)


@with_overlap
def test_selection_agrees_with_float64_up_to_ties(server, record, prompt, prefilled):
    """Every recorded choice that differs from the float64 one lies within 1e-4 (relative) of its tie."""
    flush(server)
    answer = generate(server, prompt, 2, {"heads": "uniform"})
    (event,) = events_of(record, answer.rid)
    policy = SpanPolicy(
        m=event["m"], merge=event["merge"], recent=event["recent"], sinks=event["sinks"], threshold=event["threshold"],
        scorer=event["scorer"],
    )  # fmt: skip
    different = 0
    for index in range(0, 30, 3):
        x = prefilled[0].inputs(event, index)
        scores = reference_scores.score(x, policy.scorer)
        kept, _ = reference.select(scores, policy)
        for head in range(scores.shape[0]):
            ours, theirs = set(event["kept"][index][head].tolist()), set(kept[head].tolist())
            assert len(ours) == event["m"]
            border = min(scores[head, i].item() for i in theirs if policy.sinks <= i < event["slots"] - policy.recent)
            for token in ours ^ theirs:
                different += 1
                assert abs(scores[head, token].item() - border) <= 1e-4 * border
    assert different <= 0.02 * 10 * 3 * event["m"], "ties are rare; this many differences are a different formula"


PROTECT = "40-60,290-310"  # the prompt is 300 tokens long, so 299 and on are the reply's span
PROTECTED = [*range(40, 60), *range(290, 310)]


@with_overlap
def test_protected_tokens_stay_whole_and_the_next_turn_hits(server, record, prompt, prefilled, text_tokens):
    """In every layer and head; on top of the budget; in the reply too. Ranges added later leave old entries valid."""
    answer = generate(server, prompt, 65, {"protect": PROTECT, **STRICT_RULE})
    events = events_of(record, answer.rid)
    # Of [0, 299) 29 tokens are protected, the last one, too, so no recent token is left raw; of [299, 331) 11, and 2
    # recent ones of the 5 others join the next interval.
    assert [(event["end"], event["m"]) for event in events] == [(299, 54 + 29), (331, 5 + 11), (363, 6 + 2)]
    for event, first in zip(events, (0, 299, 329), strict=True):
        whole = torch.tensor([token - first for token in PROTECTED if first <= token < event["end"]], dtype=torch.int64)
        kept, assign = event["kept"], event["assign"]
        assert (kept[..., : len(whole)] == whole).all()
        own = torch.arange(len(whole))
        assert (assign[..., whole] == own).all(), "each in a cluster of its own"
        assert ((assign >= 0) & (assign < len(whole))).sum(-1).unique().tolist() == [len(whole)], "joined by nobody"
    assert answer.keepkv["protected_tokens"] == 40
    row = prefilled[0].clone()
    assert worst(answer, prefilled[1], row.follow(answer.ids, events)) <= BOUND

    turn2 = prompt + answer.ids + text_tokens[500:620]
    second = generate(server, turn2, 40, {"protect": PROTECT + ",400-420", **STRICT_RULE})
    assert second.keepkv["cached_compressed_tokens"] == second.cached >= 364
    assert second.keepkv["protected_tokens"] == 60
    row.truncate(second.cached)
    first2 = row.feed(turn2[second.cached :])[-1]
    assert worst(second, first2, row.follow(second.ids, events_of(record, second.rid))) <= BOUND
    for index, layer in enumerate(row.layers):
        full = prefilled[0].layers[index]
        assert torch.equal(layer.k[:29], full.k[PROTECTED[:29]]) and torch.equal(layer.v[:29], full.v[PROTECTED[:29]])
        assert not layer.lv[:29].any(), "one vote each"
    # The prompt's entry does not hold what others mark in it; that of the reply is another with other marks.
    assert generate(server, turn2, 2, {"protect": "40-61", **STRICT_RULE}).cached == 0
    assert generate(server, turn2, 2, {"protect": "40-60,290-311", **STRICT_RULE}).cached == 299
    numbers(server)


@with_overlap
def test_fair_shares_in_every_layer_and_head(server, record, prompt, prefilled):
    answer = generate(server, prompt, 8, {"fair": "100-130,130-200", "protect": "100-105", **STRICT_RULE})
    (event,) = events_of(record, answer.rid)
    assert event["m"] == 5 + 59 and event["shares"] == ((100, 130, 5), (130, 200, 14))
    for start, end, least in ((100, 130, 10), (130, 200, 14)):
        assert ((event["kept"] >= start) & (event["kept"] < end)).sum(-1).min() >= least
    row = prefilled[0].clone()
    assert worst(answer, prefilled[1], row.follow(answer.ids, [event])) <= BOUND


@with_overlap
def test_protected_tokens_survive_a_budget_in_slots(server, record, prompt, prefilled, text_tokens):
    """Where the chain is merged again, protected tokens are the first slots of what was merged before."""
    answer = generate(server, prompt, 65, {"budget": 40, "protect": PROTECT, **STRICT_RULE})
    events = events_of(record, answer.rid)
    assert [(event["end"], event["m"]) for event in events] == [(299, 40 + 29), (331, 40 + 40), (363, 40 + 40)]
    assert events[2]["whole"] == ((0, 40),)
    row = prefilled[0].clone()
    assert worst(answer, prefilled[1], row.follow(answer.ids, events)) <= BOUND
    turn2 = prompt + answer.ids + text_tokens[700:760]
    second = generate(server, turn2, 8, {"budget": 40, "protect": PROTECT + ",400-405", **STRICT_RULE})
    assert second.keepkv["cached_compressed_tokens"] >= 363
    row.truncate(second.cached)
    first2 = row.feed(turn2[second.cached :])[-1]
    events = events_of(record, second.rid)
    assert events[0]["m"] == 40 + 45 and events[0]["whole"][0] == (0, 40)
    assert worst(second, first2, row.follow(second.ids, events)) <= BOUND
    for index, layer in enumerate(row.layers):
        full = prefilled[0].layers[index]
        assert torch.equal(layer.k[:29], full.k[PROTECTED[:29]]) and torch.equal(layer.v[:29], full.v[PROTECTED[:29]])
        assert not layer.lv[:45].any()
    numbers(server)


@with_overlap
@pytest.mark.parametrize("heads", ["uniform", "all"])
def test_keepkv_eval_keeps_the_same_slots_with_the_same_votes(server, record, prompt, model_path, heads):
    """The server and the offline harness on the same tokens. Both compute in float32, by different attention kernels
    (differences of 1e-5), so near ties may fall differently: at most one kept token or cluster in a thousand, and of
    shared cells one in a hundred heads may have another number."""
    flush(server)
    answer = generate(server, prompt, 2, {"heads": heads})
    (event,) = events_of(record, answer.rid)
    row = Probe(str(model_path)).row(prompt[: event["end"]])
    config = KeepKVConfig(enabled=True, budget=0.2, heads=heads)
    results = compress_with(row, config, span_policy(config, event["m"], sinks=config.sinks))
    assert row.slots == row.held == event["m"] == slots_of(0.2, event["end"])
    ours = [(head, r.assign[h], r.lv[:, h]) for layer in results for r in layer for h, head in enumerate(r.kept)]
    theirs = zip(*(event[name].flatten(0, 1) for name in ("kept", "assign")), event["lv"].mT.flatten(0, 1), strict=True)
    agreed, exact = [], 0
    for (kept, assign, lv), (their_kept, their_assign, their_lv) in zip(ours, theirs, strict=True):
        count = int((their_kept >= 0).sum())
        if len(kept) != count:
            continue
        agreed.append(((kept == their_kept[:count]).float().mean(), (assign == their_assign).float().mean()))
        if torch.equal(kept, their_kept[:count]) and torch.equal(assign, their_assign):
            exact += 1
            torch.testing.assert_close(lv, their_lv[:count], atol=2e-3, rtol=0)
    assert len(agreed) >= (1 if heads == "uniform" else 0.99) * len(ours) and exact > 0.9 * len(ours)
    assert torch.tensor(agreed).mean(0).min() >= 0.999
    assert (answer.keepkv["head_share"] == [1, 1]) == (heads == "uniform")
    numbers(server)


@with_overlap
def test_whole_number_budget_merges_its_own_chain_again(server, record, prompt, prefilled, text_tokens):
    """A budget in slots: prompt, reply and earlier turns together hold that many past the anchor."""
    answer = generate(server, prompt, 65, {"budget": 40, **STRICT_RULE})
    events = events_of(record, answer.rid)
    assert all(event["m"] == 40 and event["start"] == 0 for event in events) and len(events) == 3
    row = prefilled[0].clone()
    assert worst(answer, prefilled[1], row.follow(answer.ids, events)) <= BOUND
    assert answer.keepkv["slots_held"] <= 40 + 32
    turn2 = prompt + answer.ids + text_tokens[700:760]
    second = generate(server, turn2, 8, {"budget": 40, **STRICT_RULE})
    assert second.keepkv["cached_compressed_tokens"] >= 363
    row.truncate(second.cached)
    first2 = row.feed(turn2[second.cached :])[-1]
    assert worst(second, first2, row.follow(second.ids, events_of(record, second.rid))) <= BOUND
    numbers(server)
