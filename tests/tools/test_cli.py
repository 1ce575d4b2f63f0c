"""The `keepkv` command: subcommands, exit codes, and what `check` says when something does not match."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import keepkv_sglang
from keepkv_sglang import cli, start
from keepkv_sglang.tools import check

SCRIPT = Path(sys.executable).with_name("keepkv")


class Seam(NamedTuple):
    name: str
    ok: bool
    reason: str = ""


def _use_seams(monkeypatch: pytest.MonkeyPatch, check_all: Callable[[], list[Seam]]) -> None:
    fake = types.ModuleType("keepkv_sglang.start.seams")
    fake.check_all = check_all  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(start, "seams", fake, raising=False)


def test_console_script_prints_the_version() -> None:
    done = subprocess.run([SCRIPT, "version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, keepkv_sglang.__version__)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command.name in text for command in cli.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["model", "--nonsense"]])
def test_bad_usage_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_a_user_error_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        raise ValueError("say what to do")

    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "keepkv_sglang.tools.try_it", module)  # type: ignore[arg-type]
    monkeypatch.setattr(cli, "COMMANDS", [cli.Command("try", "", "try_it")])
    assert cli.main(["try"]) == 1
    assert capsys.readouterr().err == "keepkv try: say what to do\n"


def test_check_passes_on_this_machine() -> None:
    done = subprocess.run([SCRIPT, "check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "python",
        "keepkv-sglang",
        "sglang",
        "torch",
        "triton",
        "transformers",
        "platform",
        "CPU kernel",
    ):
        assert word in done.stdout
    assert done.stdout.strip().endswith("ready")


def test_check_names_the_seam_that_does_not_match(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _use_seams(monkeypatch, lambda: [Seam("A.b", True), Seam("C.d", False, "has no parameter `x`")])
    assert check.report() == 1
    captured = capsys.readouterr()
    assert "1 of 2 match" in captured.out
    assert "seam C.d: has no parameter `x`" in captured.err


def test_check_survives_a_broken_seam_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_all() -> list[Seam]:
        raise ImportError("no module named sglang.srt.somewhere")

    _use_seams(monkeypatch, check_all)
    assert check.report() == 1
    assert "sglang.srt.somewhere" in capsys.readouterr().err


def test_check_refuses_another_sglang(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _use_seams(monkeypatch, list)
    real = check._version
    monkeypatch.setattr(check, "_version", lambda name: "0.5.22" if name == "sglang" else real(name))
    assert check.report() == 1
    assert "pip install sglang==0.5.23" in capsys.readouterr().err
