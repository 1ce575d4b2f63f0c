"""One soak: a server, a quiet baseline, the load with its quiet moments, the end."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.places import REPO
from keepkv_sglang.tools.server_process import ServerProcess
from tests.soak import checks, texts
from tests.soak.actions import ACTIONS
from tests.soak.load import Soak
from tests.soak.shapes import SHAPES
from tests.support.client import STRICT
from tests.support.memory import resident_bytes

SHORT_S = 120
"""Such runs have a smaller oracle, and ask all of it in each quiet moment."""
INJECT = REPO / "tests" / "soak" / "inject"


@dataclass
class Report:
    text: str
    failures: list[str]
    actions: int


def soak(
    name: str, seed: int, seconds: float, model: Path, folder: Path, mutant: str = "", log: Path | None = None
) -> Report:
    """Runs it; what is wrong is in `failures`. folder: for this run's files. mutant: strikes once the load begins."""
    shape, began = SHAPES[name], time.monotonic()
    fault, armed = folder / "fault", folder / "armed"
    fault.write_text("")
    path = os.pathsep.join(filter(None, [str(INJECT), str(REPO), os.environ.get("PYTHONPATH")]))
    env = {
        **STRICT, **shape.env, "PYTHONPATH": path,
        "KEEPKV_SOAK_FAULT": str(fault), "KEEPKV_SOAK_ARMED": str(armed), "KEEPKV_SOAK_MUTANT": mutant,
    }  # fmt: skip
    server = ServerProcess(
        ["--model-path", model, "--log-level", "info", *shape.arguments],
        env=env, log_path=log or folder / "server.log", timeout_s=300,
    )  # fmt: skip
    with server:
        run = Soak(server, shape, texts.load(model), seed, fault, model, small=seconds <= SHORT_S)
        before = checks.accounting(run)["counters"]
        armed.write_text("")
        state, sizes = None, []

        def quiet(number: int, last: bool) -> str:
            nonlocal state
            state = checks.accounting(run)
            sizes.append(resident_bytes(server, "scheduler"))
            compressed = last or number % 2 == 1 or seconds <= SHORT_S  # it flushes the cache
            run.tally.most("largest difference, quiet", run.oracle.check_quiet(compressed))
            return "all as it was"

        run.run(ACTIONS, seconds, max(min(seconds, 20.0), min(90.0, seconds / 6)), quiet)
        if not run.tally.failures:
            run.guarded("end", lambda: _end(run, sizes))
        after = state["counters"] if state is not None else before
        return _report(run, name, seed, seconds, mutant, before, after, time.monotonic() - began)


def _end(run: Soak, sizes: list[int]) -> str:
    checks.nothing_is_left(run)
    checks.log_is_clean(run.server)
    if len(sizes) >= 6:
        third, last = sizes[len(sizes) // 3], sizes[-1]
        assert last <= checks.GROWN * third, f"the scheduler grew from {third >> 20} to {last >> 20} MiB"
    return "nothing is left"


def _report(
    run: Soak, name: str, seed: int, seconds: float, mutant: str, before: Any, after: Any, wall_s: float
) -> Report:
    tally = run.tally
    if tally.failures:
        dead = run.server.process.poll() is not None
        tally.failures += [f"the server {'is dead' if dead else 'lives'}; its log ends with", *run.server.log_lines(25)]
    lines = [
        f"shape {name}, seed {seed}, {mutant or 'no'} mutant: {seconds:.0f} s of load, {wall_s:.0f} s in all",
        tally.table(),
        tally.counted(before, after),
        f"FAILED: {chr(10).join(tally.failures)}" if tally.failures else f"{tally.actions} actions, nothing is wrong",
    ]
    return Report("\n".join(lines), tally.failures, tally.actions)
