"""`keepkv check --sglang`: what moved in another SGLang, and what that means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sglang

from keepkv_sglang import cli
from keepkv_sglang.start import seams
from keepkv_sglang.tools import drift

MOVED = Path("srt/mem_cache/allocation.py")


def test_every_row_has_a_meaning():
    meanings = drift.meanings_of(drift.PAGE.read_text())
    rows = (*seams.HOOKS, *seams.MEASURING, *seams.USES)
    said = {seam.target: drift.meaning_of(seam.target, meanings) for seam in rows}
    assert not [target for target, meaning in said.items() if not meaning or meaning.endswith("the same")]
    assert drift.meaning_of("after managers.scheduler.Scheduler.on_idle", meanings).startswith("**silent**")


@pytest.mark.parametrize("version", ["latest", "", "0.5.22; rm -rf /", "--pre"])
def test_no_version(version, capsys):
    with pytest.raises(ValueError, match=r"is no version; use one such as 0\.5\.23"):
        drift.run(version)
    assert not capsys.readouterr().out


def test_a_version_that_cannot_be_had_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert cli.main(["check", "--sglang", "0.0.1"]) == 1
    assert "sglang==0.0.1 cannot be installed" in capsys.readouterr().err


def with_one_file_of_its_own(folder: Path, text: str) -> None:
    """The installed SGLang in `folder`, by links, but for the file MOVED."""
    here, there = Path(sglang.__file__).parent, folder / "sglang"
    for part in (*reversed(MOVED.parents),):
        (there / part).mkdir()
        for path in (here / part).iterdir():
            if not MOVED.is_relative_to(part / path.name):
                os.symlink(path, there / part / path.name)
    (there / MOVED).write_text(text)


@pytest.mark.soak
def test_a_name_that_moved_is_found(tmp_path, monkeypatch, capsys):
    text = (Path(sglang.__file__).parent / MOVED).read_text()
    assert "def _prefix_kv_indices(" in text
    changed = text.replace("_prefix_kv_indices(", "_prefix_indices(")
    monkeypatch.setattr(drift, "install", lambda _, folder: with_one_file_of_its_own(Path(folder), changed))
    assert cli.main(["check", "--sglang", "0.5.24"]) == 1
    said = capsys.readouterr().out
    assert said.count("BAD ") == 1
    assert "BAD around mem_cache.allocation._prefix_kv_indices: not found" in said
    assert "if nobody checked: loud on a CPU: the next chunk of a compressed prompt does not fit its row" in said
