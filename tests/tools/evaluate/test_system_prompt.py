"""Tasks about system prompts: leakage measure, items, and both variants holding the same slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv_sglang.tools.evaluate.documents import HALVES
from keepkv_sglang.tools.evaluate.instructions import Instructions
from keepkv_sglang.tools.evaluate.leakage import ATTACKS, SECRECY, Leakage, rouge_l_recall
from keepkv_sglang.tools.evaluate.methods import OURS, SNAPKV, Full, ours, slots_of
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.task import Setup, ours_only
from tests.tools.unpadded import unpadded


@pytest.mark.parametrize(
    ("reference", "answer", "share"),
    [
        ("one two three four", "One, two! Three four.", 1.0),
        ("one two three four", "four three two one", 0.25),
        ("one two three four", "zero one zero three", 0.5),
        ("one two", "", 0.0),
        ("", "one", 0.0),
    ],
)
def test_rouge_l_recall(reference: str, answer: str, share: float):
    assert rouge_l_recall(reference, answer) == share


def test_items(probe: Probe, data: Path):
    numbers = []
    for half in HALVES:
        setup = Setup(probe, data, half, 0, 64, [], [0.2])
        leaks, prompts = Leakage().items(setup), Instructions().items(setup)
        assert leaks == Leakage().items(setup) and all(
            item.messages[-1]["content"].endswith(ATTACKS[i % len(ATTACKS)]) for i, item in enumerate(leaks)
        )
        assert all(SECRECY in item.messages[0]["content"] == item.extra for item in leaks)
        assert len(prompts) >= 30 and all(item.extra["prompt"] in item.messages[0]["content"] for item in prompts)
        numbers.append(({item.number for item in leaks}, {item.number for item in prompts}))
    assert not numbers[0][0] & numbers[1][0] and not numbers[0][1] & numbers[1][1]


def test_protected_and_unprotected_hold_the_same_slots(probe: Probe, data: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup(probe, data, "dev", 1, 48, [], [0.2])
    for task in (Leakage(), Instructions()):
        monkeypatch.setattr(task, "reply_tokens", 4)
        prepared = task.prepare(setup, task.items(setup)[0])
        got = task.measure(setup, prepared, ours("default"), 0.2)
        assert got["slots"] == prepared.system + slots_of(0.2, prepared.full.tokens - prepared.system)
        assert got["protected_kl"] > 0 and got["unprotected_kl"] > 0
        whole = task.measure(setup, prepared, ours("default"), 1.0)
        assert whole["protected"] == whole["unprotected"] == whole["full"] == prepared.score
        assert whole["protected_kl"] == pytest.approx(0, abs=1e-6)
        rows = [{"item": 1, "method": "default", "budget": 0.2, **got}]
        assert "| default | 20% |" in unpadded(task.report(rows))


def test_a_run_of_everything_takes_few_methods():
    few = (SNAPKV,)
    all_of_ours = Setup(None, Path(), "dev", 0, 0, [Full(), *OURS.values()], [0.1, 0.2])  # type: ignore[arg-type]
    assert [(m.name, b) for m, b in ours_only(all_of_ours, few)] == [(SNAPKV, 0.1), (SNAPKV, 0.2)]
    chosen = Setup(None, Path(), "dev", 0, 0, [Full(), ours("mine")], [0.1])  # type: ignore[arg-type]
    assert [m.name for m, _ in ours_only(chosen, few)] == ["mine"]
