"""What KEEPKV_STEP_TIMES=1 counts, and that nothing is hooked without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from keepkv_sglang.hooks import step_times
from keepkv_sglang.start import seams


class Mode:
    def __init__(self, decode: bool) -> None:
        self.decode = decode

    def is_decode(self) -> bool:
        return self.decode


def batch(decode: bool, *finished: bool, tokens: int | None = None) -> SimpleNamespace:
    reqs = [SimpleNamespace(finished=lambda over=over: over) for over in finished]
    return SimpleNamespace(forward_mode=Mode(decode), reqs=reqs, extend_num_tokens=tokens)


@pytest.fixture
def counted(monkeypatch):
    cells: dict = {"prefill": {}, "decode": {}}
    monkeypatch.setattr(step_times, "_steps", cells)
    return cells


def test_steps_are_counted_by_kind_and_by_running_requests(counted):
    seen = []

    def original(_self, ran, *rest):
        seen.append((ran, rest))
        return "result"

    ran = batch(True, False, False, True)
    assert step_times.around_run_batch(original, None, ran, 5) == "result" and seen == [(ran, (5,))]
    step_times.around_run_batch(original, None, batch(True, False, False))
    step_times.around_run_batch(original, None, batch(False, False, tokens=70))
    step_times.around_run_batch(original, None, batch(True, True))
    assert {count: cell[::2] for count, cell in counted["decode"].items()} == {2: [2, 4], 0: [1, 0]}
    assert {count: cell[::2] for count, cell in counted["prefill"].items()} == {1: [1, 70]}
    assert all(cell[1] >= 0 for cells in counted.values() for cell in cells.values())
    state = step_times.after_get_internal_state(SimpleNamespace(internal_state={}), None).internal_state
    assert state["step_times"]["decode"]["2"][::2] == [2, 4]


@pytest.mark.parametrize(("value", "hooked"), [(None, False), ("0", False), ("1", True)])
def test_nothing_is_hooked_unless_asked(monkeypatch, value, hooked):
    from sglang.srt.plugins.hook_registry import HookRegistry

    from keepkv_sglang import plugin

    targets = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: targets.append(target))
    monkeypatch.delenv(step_times.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(step_times.VARIABLE, value)
    plugin.register()
    assert (seams.MEASURING[0].target in targets) == hooked
    assert len(targets) == len(seams.HOOKS) + (len(seams.MEASURING) if hooked else 0)
