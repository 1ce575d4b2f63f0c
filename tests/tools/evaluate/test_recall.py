"""Password items: well-formed, deterministic, different in the two halves."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv_sglang.tools.evaluate import recall
from keepkv_sglang.tools.evaluate.documents import HALVES
from keepkv_sglang.tools.evaluate.methods import ours, slots_of
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.recall import ITEMS, NAMES, WORDS, Needle, Recall, RecallAfter, make_items, plant
from keepkv_sglang.tools.evaluate.task import Setup, with_originals
from tests.tools.unpadded import unpadded


@pytest.fixture(scope="module")
def setups(probe: Probe, data: Path) -> dict[str, Setup]:
    return {half: Setup(probe, data, half, 0, 256, [], [0.5]) for half in HALVES}


def test_lists():
    assert len(set(NAMES)) == len(NAMES) and len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize("half", HALVES)
def test_items_are_well_formed(setups: dict[str, Setup], half: str):
    made = Recall().items(setups[half])
    assert len({item.number for item in made}) == ITEMS
    for item in made:
        text = setups[half].probe.tokenizer.decode(item.prompt)
        assert len(item.prompt) == 256
        places = [text.index(f"The password of {name} is '{word}'.") for name, word in item.facts]
        assert places == sorted(places)
        assert text.count("The password of") == Recall.facts
        assert item.asked in dict(item.facts)
        assert len(dict(item.facts)) == len({word for _, word in item.facts}) == Recall.facts
    assert len({item.facts for item in made}) == ITEMS


def test_items_stay_the_same_and_halves_differ(setups: dict[str, Setup]):
    dev, held = (make_items(setups[half], 3, 12) for half in HALVES)
    assert dev == make_items(setups["dev"], 3, 12)
    assert not {item.number for item in dev} & {item.number for item in held}
    for part in (0, 1):
        assert not {fact[part] for item in dev for fact in item.facts} & {f[part] for i in held for f in i.facts}
    assert all(len(item.facts) == 1 for item in make_items(setups["dev"], Needle.facts, 3))


def test_too_little_room(probe: Probe, ids: list[int]):
    import random

    with pytest.raises(ValueError, match="too few"):
        plant(probe, ids, [("Alice", "walnut")], 20, random.Random(0))


def test_the_question_read_over_originals(probe: Probe, data: Path, monkeypatch: pytest.MonkeyPatch):
    """One answer token: that of the full cache. Text and question are compressed to the budget, but the last token."""
    monkeypatch.setattr(recall, "ANSWER_TOKENS", 1)
    setup = Setup(probe, data, "dev", 1, 128, [ours("default")], [0.25], ["off", "native"])
    task = RecallAfter()
    prepared = task.prepare(setup, task.items(setup)[0])
    found = []
    monkeypatch.setattr(recall, "_word", lambda _, made: found.append(made) or "")
    (full, _), *rest = with_originals(task.pairs(setup), setup.originals)
    assert [method.originals for method, _ in rest] == ["off", "native"]
    task.measure(setup, prepared, full, 1.0)
    of_full = found[:]
    found.clear()
    off = task.measure(setup, prepared, *rest[0])
    found.clear()
    native = task.measure(setup, prepared, *rest[1])
    assert found == of_full and len(found) == Recall.facts
    asked = len(probe.ids(recall.question(prepared.item.asked) + recall.opening()))
    assert off["answer_slots"] == off["slots"] + asked == slots_of(0.25, 128) + asked
    assert native["answer_slots"] == slots_of(0.25, 127) + asked + 1, "a short turn stays whole"


def test_reports_show_originals_beside_off():
    """Rows of before have neither originals nor which questions were right."""
    shared = {"task": "recall_after", "asked": 3, "source": "bfcl", "slots": 9}
    rows = [
        {**shared, "method": "full", "budget": 1.0, "item": i, "hits": 2, "right": [True, True, False]} for i in (1, 2)
    ]
    rows += [{**shared, "method": "default", "budget": 0.2, "item": i, "hits": 0} for i in (1, 2)]
    assert "Originals" not in RecallAfter().report(rows)
    rows += [
        {**shared, "method": "default", "budget": 0.2, "item": i, "originals": "int4", "hits": 1, "answer_slots": 7,
         "right": [True, False, False]} for i in (1, 2)
    ]  # fmt: skip
    report = unpadded(RecallAfter().report(rows))
    assert "| default | 20% | off | 2 | - | 0 of 6 | 0.0 [0.0, 0.0] | - | - |" in report
    assert "| 2 | 7 | 2 of 6 | 33.3 [33.3, 33.3] | 50.0 [50.0, 50.0] | 33.3 [33.3, 33.3] |" in report
    assert "| default, originals int4 | 20% |" in report


def test_a_cache_at_full_budget_answers_as_the_full_cache(probe: Probe, data: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing compressed: the same hits, in both orders of question and compression."""
    monkeypatch.setattr(recall, "ANSWER_TOKENS", 2)
    setup = Setup(probe, data, "dev", 1, 128, [], [0.5])
    for task in (Recall(), RecallAfter()):
        item = task.items(setup)[0]
        prepared = task.prepare(setup, item)
        full = task.measure(setup, prepared, task.pairs(setup)[0][0], 1.0)
        same = task.measure(setup, prepared, ours("default"), 1.0)
        assert full == same
        assert full["asked"] == (1 if task.question_seen else Recall.facts)
        half = task.measure(setup, prepared, ours("default"), 0.5)
        assert half["slots"] == -(-len(prepared.ids) // 2)
