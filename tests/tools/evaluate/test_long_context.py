"""Task `long`, at lengths that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv_sglang.tools.evaluate import long_context, recall
from keepkv_sglang.tools.evaluate.documents import HALVES
from keepkv_sglang.tools.evaluate.long_context import FOLLOWING, Long
from keepkv_sglang.tools.evaluate.methods import DEFAULT, OURS
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.task import Setup


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context, "LENGTHS", (256, 512))


def setup_of(probe: Probe, data: Path, half: str = "held-out", items: int = 2) -> Setup:
    return Setup(probe, data, half, items, 0, [OURS[DEFAULT]], [0.2])


def test_contexts_have_their_length_a_password_and_a_question_at_the_end(probe: Probe, data: Path):
    by_half = {half: Long().items(setup_of(probe, data, half)) for half in HALVES}
    for items in by_half.values():
        assert [item.length for item in items] == [256, 256, 512, 512] and len({item.number for item in items}) == 4
        for item in items:
            assert (len(item.prompt), len(item.following)) == (item.length, FOLLOWING)
            text = probe.tokenizer.decode(item.prompt)
            name = text.rsplit(" ", 1)[1]
            assert text.count(f"The password of {name} is '{item.word}'.") == 1
            assert text.endswith(recall.question(name))
            assert probe.tokenizer.decode(item.following).startswith(f" is '{item.word}'.")
    assert not {i.number for i in by_half["dev"]} & {i.number for i in by_half["held-out"]}
    assert not {i.word for i in by_half["dev"]} & {i.word for i in by_half["held-out"]}


def test_it_measures_and_says_how_seconds_grow(probe: Probe, data: Path):
    task, setup = Long(), setup_of(probe, data, items=1)
    rows = []
    for item in task.items(setup):
        prepared = task.prepare(setup, item)
        assert prepared.full.slots == item.length
        values = task.measure(setup, prepared, OURS[DEFAULT], 0.2)
        assert values["slots"] == -(-item.length // 5) and 0 < values["kl"] < 20 and values["seconds"] > 0
        assert prepared.full.slots == item.length, "the full cache is as it was"
        rows.append({"item": item.number, "method": DEFAULT, "budget": 0.2, **values})
    rows[0]["seconds"], rows[1]["seconds"] = 1.0, 4.0
    lines = task.report(rows).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")][10:12] == ["4.00", "2.00"]


def test_a_model_with_too_few_positions_is_refused(probe: Probe, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(long_context, "LENGTHS", (8192,))
    with pytest.raises(ValueError, match="needs a model with more than 8448 positions"):
        Long().items(setup_of(probe, data))
