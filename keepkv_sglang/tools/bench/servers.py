"""The servers that are compared, and one measured run against one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keepkv_sglang.hooks.step_times import VARIABLE
from keepkv_sglang.start import flags
from keepkv_sglang.tools.agent_load import AgentLoad
from keepkv_sglang.tools.server_process import ServerError, ServerProcess

from . import measure
from .client import Call
from .workloads import Agents, Tick, Workload

NAMES = ("stock", "keepkv", "originals", "budget1", "disabled")
ABOUT = {
    "stock": "SGLang with its radix cache, KeepKV off; on a CPU the plain platform with torch_native attention",
    "keepkv": "--enable-keepkv at the given budget",
    "originals": "the same with --keepkv-host-ratio: later turns are read over originals in host memory",
    "budget1": "--enable-keepkv --keepkv-budget 1: our attention kernel and caches, nothing compressed",
    "disabled": "our attention backend without --enable-keepkv: SGLang's radix cache, no votes",
}
WARM_UP = Agents(AgentLoad(agents=2, turns=2, system=40, task=120, seed=99))


@dataclass(frozen=True)
class Setup:
    """What all runs share. extra: flags for every server; keepkv_flags: for those with --enable-keepkv."""

    model: str
    budget: str
    extra: tuple[str, ...] = ()
    keepkv_flags: tuple[str, ...] = ()
    host_ratio: float = 4
    start_timeout_s: float = 600

    def flags(self, name: str, pool: int) -> list[str]:
        """Arguments of sglang.launch_server. ValueError for an unknown name."""
        keepkv = ["--enable-keepkv", "--keepkv-budget", self.budget, *self.keepkv_flags]
        own = {
            "stock": [],
            "keepkv": keepkv,
            "originals": [*keepkv, "--keepkv-host-ratio", str(self.host_ratio)],
            "budget1": ["--enable-keepkv", "--keepkv-budget", "1", *self.keepkv_flags],
            "disabled": ["--attention-backend", flags.AUTO_BACKEND.get(flags.default_device(), flags.CPU_BACKEND)],
        }
        if name not in own:
            raise ValueError(f"no server is called {name!r}; use {', '.join(NAMES)}")
        return ["--model-path", self.model, "--max-total-tokens", str(pool), *self.extra, *own[name]]

    def start(self, name: str, pool: int) -> ServerProcess:
        """The server, not yet entered; it measures its steps (step_times.py)."""
        return ServerProcess(
            self.flags(name, pool),
            timeout_s=self.start_timeout_s,
            env={VARIABLE: "1"},
        )


def run(server: ServerProcess, workload: Workload, tick: Tick) -> tuple[list[Call], dict[str, Any]]:
    """One measured run on a server that was warmed up and emptied: all calls, and the numbers of measure.py."""
    before = state(server)
    began = time.perf_counter()
    calls = workload.run(server.port, tick)
    seconds = time.perf_counter() - began
    return calls, measure.summarise(calls, seconds, before, state(server))


def warm_up(server: ServerProcess) -> None:
    """First calls compile and allocate; then the cache is emptied. ServerError when the server does not answer."""
    calls = WARM_UP.run(server.port, lambda: None)
    bad = [call.error for call in calls if not call.ok]
    if bad:
        raise ServerError(f"the server does not answer its warm-up (a larger --pool?): {bad[0]}")
    flush(server)


def flush(server: ServerProcess) -> None:
    """Empties the prefix cache."""
    status, answer = server.post_json("/flush_cache", {})
    if status != 200:
        raise ServerError(f"/flush_cache: HTTP {status} {answer}")


def state(server: ServerProcess) -> dict[str, Any]:
    """The scheduler's part of /server_info."""
    status, info = server.get_json("/server_info")
    if status != 200:
        raise ServerError(f"/server_info: HTTP {status} {info}")
    found: dict[str, Any] = info["internal_states"][0]
    if "step_times" not in found:
        raise ServerError(f"the server does not measure its steps; {VARIABLE}=1 did not reach it, see `keepkv check`")
    return found


def order(names: Sequence[str], repeat: int) -> list[str]:
    """Servers of one pool in the order of this repeat: every other one backwards, so that no server is always first."""
    return list(names) if repeat % 2 == 0 else list(reversed(names))
