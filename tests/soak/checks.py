"""What must hold whenever nothing runs, and at the end."""

from __future__ import annotations

import re
import time
from typing import Any

from keepkv_sglang.tools.server_process import ServerProcess
from tests.soak.control import SAID
from tests.soak.load import Soak
from tests.support.client import flush, numbers
from tests.support.memory import resident_bytes

BAD = re.compile(r"Traceback|Exception|\bError\b|\bERROR\b|leak|CRITICAL|Assertion")
EXPECTED = re.compile(r"server_args=|\[http_server\] Error: ")
"""Flags, and what a refused request was told."""
ERRORS_OF = {
    "compression", "compression between chunks", "after_stash_chunked_request", "before_admission", "unpack", "archive",
}  # fmt: skip
"""What counts the errors of inject/errors.py, in /server_info."""
GROWN = 1.10
"""Of the scheduler's private memory, from the first quiet moment after a third of the run to the end: allocators' own
fragments. 20,000 requests grow it by 2 % (tests/server/test_agents.py)."""


def idle(server: ServerProcess, patience_s: float = 90) -> dict[str, Any]:
    """Waits until no request holds anything: aborted ones need a step or two. AssertionError: something is stuck."""
    deadline = time.monotonic() + patience_s
    while True:
        status, info = server.get_json("/server_info")
        assert status == 200, info
        state: dict[str, Any] = info["internal_states"][0]["keepkv"]
        memory = state["memory"]
        free = memory["arena_free_rows"] == memory["arena_rows"]
        if not state["active_rows"] and not state["protected_slots"] and free:
            return state
        assert time.monotonic() < deadline, f"something is held although nothing runs: {state}"
        time.sleep(0.3)


def accounting(soak: Soak) -> dict[str, Any]:
    """Nothing runs: every slot and block is free or cached; only errors that were injected."""
    idle(soak.server)
    time.sleep(0.5)  # the scheduler is idle for a moment: with KEEPKV_CHECK=1 it walks over both trees
    state = numbers(soak.server, faults=True)
    assert set(state["errors"]) <= ERRORS_OF, state["errors"]
    assert not state["protected_slots"], state
    if (originals := state.get("originals")) is not None:
        assert originals["unpacked_slots"] == 0, originals
    soak.tally.most("MiB of the scheduler", resident_bytes(soak.server, "scheduler") / 2**20)
    return state


def nothing_is_left(soak: Soak) -> dict[str, Any]:
    """After a flush every slot and every block of host memory is free."""
    flush(soak.server, faults=True)
    state = numbers(soak.server, faults=True)
    originals = state.get("originals")
    if originals is not None:
        assert originals["free_blocks"] == originals["blocks"] and not originals["tokens"], originals
    return state


def log_is_clean(server: ServerProcess) -> None:
    """No traceback that was not injected, and no word of a leak."""
    assert server.log_path is not None
    lines = server.log_path.read_text(errors="replace").splitlines()
    bad, skip = [], False
    for line in lines:
        if line.startswith("[20"):  # a record of the log; a traceback follows its own
            skip = SAID in line
        if not skip and BAD.search(line) and not EXPECTED.search(line):
            bad.append(line[:300])
    assert not bad, "the log says:\n" + "\n".join(bad[:12])
