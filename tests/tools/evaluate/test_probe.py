"""The probe's attention over rows against transformers, and against the float64 replay of the server tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.methods import Full, compress_tail, ours, slots_of
from keepkv_sglang.tools.evaluate.probe import Probe, Slots, agreement
from tests.support.replay import Replay

CONFIG = KeepKVConfig(enabled=True)
# float32 against float32 or float64: one forward pass of this model differs from float64 by about 2e-5.
BOUND = 1e-4


@pytest.fixture(scope="module")
def replay(model_path: Path) -> Any:
    """tests/support/replay.py: the oracle, which shares no code with the probe."""
    return Replay.load(str(model_path))


def test_a_raw_row_is_the_plain_model(probe: Probe, ids: list[int]):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(probe.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = plain(torch.tensor([ids[:60]])).logits[0].log_softmax(-1)
    row = probe.row()
    pieces = [row.feed(ids[:1]), row.feed(ids[1:40]), row.feed(ids[40:59]), row.feed(ids[59:60])]
    assert (torch.cat(pieces) - wanted).abs().max() < BOUND
    assert row.tokens == row.slots == 60
    assert (probe.row().feed(ids[:60], last=3) - wanted[-3:]).abs().max() < BOUND


@pytest.mark.parametrize("merge", ["least_squares", "mean", "evict"])
def test_a_compressed_row_is_a_dense_computation_in_float64(probe: Probe, replay: Any, ids: list[int], merge: str):
    row = probe.row(ids[:100])
    compress_tail(row, ours("x", merge=merge).config, 20, start=10)
    row.feed(ids[100:110])
    compress_tail(row, ours("x", merge=merge).config, 4, start=30)
    assert (row.slots, row.tokens) == (34, 110)
    oracle = replay.clone()
    for mine, layer in zip(row.layers, oracle.layers, strict=True):
        layer.k, layer.v, layer.lv = (t.double() for t in mine)
        if merge == "evict":
            assert not layer.lv.any()
    oracle.tokens = row.tokens
    wanted = oracle.feed(ids[110:120])
    got = torch.cat([row.feed(ids[110:111]), row.feed(ids[111:120])])
    assert (got.double() - wanted).abs().max() < BOUND


def test_replace_span(probe: Probe, ids: list[int]):
    row = probe.row(ids[:12])
    other = row.clone()
    new = [Slots(s.k[:3] + 1, s.v[:3] + 2, s.lv[:3] + 3) for s in row.layers]
    row.replace_span(new, start=5)
    assert (row.slots, row.tokens, other.slots) == (8, 12, 12)
    for got, was, put in zip(row.layers, other.layers, new, strict=True):
        for a, b, c in zip(got, was, put, strict=True):
            assert torch.equal(a[:5], b[:5]) and torch.equal(a[5:], c)
    row.replace_span(new)
    assert row.slots == 3 and all(torch.equal(a.k, b.k) for a, b in zip(row.layers, new, strict=True))


def test_a_clone_is_independent(probe: Probe, ids: list[int]):
    row = probe.row(ids[:20])
    wanted = row.clone().feed(ids[20:30])
    copied = row.clone()
    compress_tail(copied, CONFIG, 8)
    copied.feed(ids[20:25])
    assert (row.slots, row.tokens, copied.slots, copied.tokens) == (20, 20, 13, 25)
    assert torch.equal(row.feed(ids[20:30]), wanted)


def test_compress_tail_keeps_what_is_before_it_and_full_budget_changes_nothing(probe: Probe, ids: list[int]):
    row = probe.row(ids[:40])
    before = list(row.layers)
    assert compress_tail(row, CONFIG, 40) == 0 and compress_tail(row, CONFIG, 30, start=10) == 0
    assert all(a is b for a, b in zip(row.layers, before, strict=True))
    assert compress_tail(row, CONFIG, 7, start=10) == 3, "half of the slots are recent tokens"
    assert row.slots == 17
    for new, old in zip(row.layers, before, strict=True):
        assert all(torch.equal(a[:10], b[:10]) for a, b in zip(new, old, strict=True))
        assert torch.equal(new.k[-3:], old.k[-3:]), "their own keys"
    row.feed(ids[40:50])
    assert compress_tail(row, CONFIG, 4 + 3, start=14, carried=3) == 3, "what was left raw moves on"
    assert row.slots == 14 + 7


def test_methods_hold_what_the_budget_allows(probe: Probe, ids: list[int]):
    full = probe.row(ids[:60])
    for budget in (0.1, 0.25):
        assert ours("x").prefill(probe, ids[:60], budget, full).slots == slots_of(budget, 60)
    assert Full().prefill(probe, ids[:60], 0.1, full).slots == full.slots == 60
    assert [slots_of(b, n) for b, n in ((0.1, 30), (0.2, 31), (0.01, 5))] == [3, 7, 1]


def test_generate_stops_and_keeps_what_was_fed(probe: Probe, ids: list[int]):
    made = probe.row(ids[:19]).generate(ids[19:20], 4)
    row = probe.row(ids[:19])
    tokens, expected = ids[19:20], []
    for _ in range(4):
        expected.append(int(row.feed(tokens, last=1)[-1].argmax()))
        tokens = expected[-1:]
    assert made == expected
    assert probe.row(ids[:19]).generate(ids[19:20], 4, stop=made[:1]) == []


def test_agreement_of_known_distributions():
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    got = agreement(full, other, [0, 1])
    assert got.kl == pytest.approx(0.5 * (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()).item())
    assert got.top1 == 0.5  # equal probabilities: the first token
    assert got.nll == pytest.approx(-torch.tensor(0.75).log().item())


def test_two_probes_in_one_process(model_path, probe, ids):
    """Each has its own attention function and its own row."""
    other = Probe(str(model_path))
    assert torch.equal(other.row().feed(ids[:20]), probe.row().feed(ids[:20]))
