"""Results on disk: a run goes on where it stopped, also after a line that was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv_sglang.tools.evaluate.results import Results, grouped, variants

RUN = {"model": "m", "tokens": 64, "half": "dev"}


def test_goes_on_where_it_stopped(tmp_path: Path):
    path = tmp_path / "folder" / "dev.jsonl"
    first = Results(path, RUN)
    first.add("t", "a", 0.1, 3, kl=0.5)
    again = Results(path, RUN)
    assert again.rows == [{"task": "t", "method": "a", "budget": 0.1, "item": 3, "kl": 0.5}]
    assert again.has("t", "a", 0.1, 3)
    assert not again.has("t", "a", 0.2, 3) and not again.has("t", "a", 0.1, 4) and not again.has("u", "a", 0.1, 3)


def test_originals_are_part_of_the_key(tmp_path: Path):
    """A row without them is one that was measured without."""
    results = Results(tmp_path / "dev.jsonl", RUN)
    results.add("t", "a", 0.1, 3, kl=0.5)
    assert results.has("t", "a", 0.1, 3, "off") and not results.has("t", "a", 0.1, 3, "int4")
    results.add("t", "a", 0.1, 3, originals="int4", kl=0.4)
    results = Results(tmp_path / "dev.jsonl", RUN)
    assert results.has("t", "a", 0.1, 3) and results.has("t", "a", 0.1, 3, "int4")
    assert [(row["originals"], row["variant"]) for row in variants(results.rows)] == [
        ("off", "a"),
        ("int4", "a, originals int4"),
    ]


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_line_cut_off_is_measured_again_and_swallows_nothing(tmp_path: Path, lost: int):
    path = tmp_path / "dev.jsonl"
    results = Results(path, RUN)
    for item in range(3):
        results.add("t", "a", 0.1, item, kl=float(item))
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    again = Results(path, RUN)
    kept = 3 if lost == 1 else 2  # only the line break was lost: the row is complete
    assert [row["item"] for row in again.rows] == list(range(kept))
    if kept == 2:
        again.add("t", "a", 0.1, 2, kl=2.0)
    assert path.read_bytes() == whole
    assert len(Results(path, RUN).rows) == 3


def test_two_set_ups_do_not_share_a_file(tmp_path: Path):
    path = tmp_path / "dev.jsonl"
    Results(path, RUN)
    with pytest.raises(ValueError, match="other settings"):
        Results(path, {**RUN, "tokens": 128})
    path.write_text("")
    with pytest.raises(ValueError, match="other settings"):
        Results(path, RUN)


def test_grouped_keeps_the_order():
    rows = [{"a": 2, "b": 1}, {"a": 1, "b": 1}, {"a": 2, "b": 3}]
    assert list(grouped(rows, "a")) == [(2,), (1,)]
    assert grouped(rows, "a")[(2,)] == [rows[0], rows[2]]
