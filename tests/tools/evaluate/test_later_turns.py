"""Tasks whose question comes in a later turn: RULER's needles and IFEval's instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv_sglang.tools.evaluate import instructions_after
from keepkv_sglang.tools.evaluate.conversation import end_tokens
from keepkv_sglang.tools.evaluate.documents import HALVES
from keepkv_sglang.tools.evaluate.instructions_after import InstructionsAfter
from keepkv_sglang.tools.evaluate.methods import ours
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.ruler import RulerAfter
from keepkv_sglang.tools.evaluate.task import Setup, with_originals
from tests.tools.unpadded import unpadded


def setup_of(probe: Probe, data: Path, half: str = "dev", items: int = 2, tokens: int = 512) -> Setup:
    return Setup(probe, data, half, items, tokens, [ours("default")], [0.2], ["off", "native"])


@pytest.mark.parametrize("half", HALVES)
def test_ruler_items_are_whole_lines_that_hold_what_is_asked(probe: Probe, data: Path, half: str):
    for item in RulerAfter().items(setup_of(probe, data, half, 4)):
        text = probe.tokenizer.decode(item.prompt)
        assert len(item.prompt) <= 512 and text.endswith(".\n")
        assert len({key for key, _ in item.facts}) == RulerAfter.facts and item.asked in dict(item.facts)
        for key, value in item.facts:
            assert f"One of the special magic uuids for {key} is: {value}.\n" in text and len(value) == 36
    numbers = [{item.number for item in RulerAfter().items(setup_of(probe, data, half, 4))} for half in HALVES]
    assert not numbers[0] & numbers[1]


def test_ruler_reads_the_answer_up_to_its_end(probe: Probe, data: Path):
    task = RulerAfter()
    value = task.items(setup_of(probe, data))[0].facts[0][1]
    for said in (f" {value}.", f" {value}\nOne of the", value):
        assert task.answer(probe, probe.ids(said)) == value
    assert len(probe.ids(f" {value}.")) <= task.answer_tokens()
    with pytest.raises(ValueError, match="use a larger --tokens"):
        task.items(setup_of(probe, data, tokens=96))


def test_instructions_of_an_earlier_turn(probe: Probe, data: Path, monkeypatch: pytest.MonkeyPatch):
    """Uncompressed, both ways to read a conversation answer as one prefill of all of it; compressed, the full cache's
    first token is still expected where the originals are read."""
    monkeypatch.setattr(instructions_after, "REPLY_TOKENS", 6)
    setup, task = setup_of(probe, data, items=1), InstructionsAfter()
    (item,) = task.items(setup)
    prepared = task.prepare(setup, item)
    ids = item.first + item.reply + item.second
    said = probe.row(ids[:-1]).generate(ids[-1:], 6, end_tokens(probe))
    made: list[list[int]] = []
    monkeypatch.setattr(task, "_score", lambda setup, item, ids: made.append(list(ids)) or 0.0)
    rows = []
    for method, _ in with_originals(task.pairs(setup), setup.originals):
        for budget in (1.0, 0.2):
            values = task.measure(setup, prepared, method, budget)
            rows.append({"method": "m", "budget": budget, "item": 0, "originals": method.originals, **values})
    assert made[0] == made[2] == said
    assert made[3][0] == said[0]
    assert rows[0]["slots"] == len(ids) - 1 and rows[1]["slots"] < 0.6 * len(ids)
    report = unpadded(task.report([replace_followed(row) for row in rows]))
    assert "| m | 20% | native | 1 |" in report and "50.0" in report


def replace_followed(row: dict) -> dict:
    return row | {"followed": 1.0 if row["originals"] == "native" else 0.5}
