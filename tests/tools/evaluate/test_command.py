"""`keepkv eval` from one end to the other on two tiny items, interrupted and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.evaluate import recall
from keepkv_sglang.tools.evaluate.command import TASKS, _task
from keepkv_sglang.tools.evaluate.methods import SNAPKV
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.report import plots
from tests.tools.unpadded import unpadded


def test_every_task_loads():
    for name in TASKS:
        task = _task(name)
        assert task.name == name and type(task).__doc__


def needles(out: Path, data: Path, model_path: Path, items: int) -> list[str]:
    """A small run of task needle."""
    options = ["eval", "--task", "needle", "--half", "dev", "--items", str(items), "--tokens", "96", "--budget", "0.5"]
    options += ["--method", SNAPKV, "--data", str(data), "--model", str(model_path), "--threads", "1"]
    return [*options, "--out", str(out)]


def test_a_run_resumes_and_reports(
    tmp_path: Path, data: Path, model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    options = needles(tmp_path, data, model_path, 2)
    monkeypatch.setattr(recall, "ANSWER_TOKENS", 3)
    assert cli.main(options) == 0
    assert (tmp_path / "needle.png").exists() == plots.available()
    monkeypatch.setattr(plots, "available", lambda: False)
    path = tmp_path / "dev.jsonl"
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()[1:]]
    assert {(row["item"], row["method"], row["budget"]) for row in rows} == {
        (item, method, budget) for item in (0, 2) for method, budget in (("full", 1.0), (SNAPKV, 0.5))
    }
    report = (tmp_path / "report-dev.md").read_text()
    assert "## needle" in report and f"| {SNAPKV} | 50% | 2 | 2 |" in unpadded(report)
    assert report in capsys.readouterr().out
    assert json.loads((tmp_path / "results-dev.json").read_text()) == rows

    path.write_text(whole[:-20])  # interrupted while the last row was written
    assert cli.main(options) == 0
    assert path.read_text() == whole

    monkeypatch.setattr(Probe, "__init__", lambda *_: pytest.fail("a report needs no model"))
    assert cli.main([*options, "--report"]) == 0
    assert path.read_text() == whole
    assert cli.main([*options, "--report", "--tokens", "64"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_processes_share_a_run(
    tmp_path: Path, data: Path, model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Each part writes the rows of its items to a file of its own; the report and a later run know all of them."""
    options = needles(tmp_path, data, model_path, 3)
    monkeypatch.setattr(recall, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(plots, "available", lambda: False)
    for part in ("1/2", "2/2"):
        assert cli.main([*options, "--part", part]) == 0
    items = {}
    for part in (1, 2):
        rows = (tmp_path / f"dev-{part}of2.jsonl").read_text().splitlines()[1:]
        items[part] = [json.loads(row)["item"] for row in rows]
    assert items == {1: [0, 0, 4, 4], 2: [2, 2]}
    monkeypatch.setattr(Probe, "run", lambda *_: pytest.fail("everything is there"))
    capsys.readouterr()
    assert cli.main([*options, "--report"]) == 0
    assert f"| {SNAPKV} | 50% | 3 | 3 |" in unpadded(capsys.readouterr().out)
    assert cli.main(options) == 0
    for wrong in ("3/2", "0/2", "half"):
        with pytest.raises(SystemExit):
            cli.main([*options, "--part", wrong])
        assert "give I/N with I from 1 to N" in capsys.readouterr().err


def test_a_run_goes_on_with_originals(
    tmp_path: Path, data: Path, model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Rows from before there were originals are those without; other tasks know nothing of them."""
    options = ["eval", "--half", "dev", "--items", "1", "--tokens", "96", "--budget", "0.5", "--method", SNAPKV]
    options += ["--data", str(data), "--model", str(model_path), "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(recall, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(plots, "available", lambda: False)
    assert cli.main([*options, "--task", "needle_after"]) == 0
    path = tmp_path / "dev.jsonl"
    head, *rows = path.read_text().splitlines()
    assert [json.loads(row)["originals"] for row in rows] == ["off", "off"]
    before = [row.replace('"originals": "off", ', "") for row in rows]
    path.write_text("\n".join([head, *before]) + "\n")
    options += ["--originals", "off", "--originals", "native", "--originals", "off"]
    for _ in range(2):
        assert cli.main([*options, "--task", "needle_after", "--task", "needle"]) == 0
        after = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        assert after[:2] == [json.loads(row) for row in before]
        assert [(row["task"], row["method"], row.get("originals")) for row in after[2:]] == [
            ("needle_after", SNAPKV, "native"),
            ("needle", "full", None),
            ("needle", SNAPKV, None),
        ]
    report = unpadded(capsys.readouterr().out)
    assert (
        f"| {SNAPKV}, originals native | 50% | 1 | 1 |" in report and "**Originals; differences by prompt**" in report
    )


def test_mistakes_are_told(tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["eval", "--out", str(tmp_path), "--model", str(model_path)]
    assert cli.main([*common, "--method", "nonesuch"]) == 1
    assert cli.main([*common, "--budget", "1.5"]) == 1
    assert "--list shows all" in capsys.readouterr().err
