"""One look at a server: what /server_info, /v1/loads and, where it is on, /metrics say."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from keepkv_sglang.observe.families import VOTES
from keepkv_sglang.tools.remote import Remote, keepkv_states


@dataclass(frozen=True)
class Reading:
    """when: seconds of time.monotonic. config: of KeepKV. counters: runtime/counters.py. state: the other numbers of
    /server_info. running, waiting, tokens_per_s: requests, and tokens generated. All but config are sums over the
    ranks of data parallelism. votes: slots by the upper bound of their votes; empty where metrics are off."""

    url: str
    model: str
    when: float
    config: Mapping[str, Any]
    counters: Mapping[str, float]
    state: Mapping[str, float]
    errors: Mapping[str, int]
    originals: Mapping[str, float] | None
    codec: str = ""
    running: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0
    votes: Mapping[float, float] = field(default_factory=dict)


def read(server: Remote) -> Reading:
    """Raises UnreachableError, OffError."""
    info, loads = server.get("/server_info"), server.get("/v1/loads?include=core")
    votes = votes_of(server.text("/metrics")) if info.get("enable_metrics") else {}
    return reading_of(server.url, info, loads, votes)


def reading_of(
    url: str, info: Mapping[str, Any], loads: Mapping[str, Any], votes: Mapping[float, float] | None = None
) -> Reading:
    """Of the answers themselves. Raises OffError."""
    states = keepkv_states(url, info)
    kept = [state["originals"] for state in states if "originals" in state]
    cores = loads.get("loads", ())
    return Reading(
        url=url,
        model=str(info.get("served_model_name") or info.get("model_path", "")).rstrip("/").rsplit("/", 1)[-1],
        when=time.monotonic(),
        config=states[0]["config"],
        counters=_sums(state["counters"] for state in states),
        state=_sums({**state, **state["memory"]} for state in states),
        errors={name: int(count) for name, count in _sums(state["errors"] for state in states).items()},
        originals=_sums(kept) if kept else None,
        codec=kept[0]["codec"] if kept else "",
        running=sum(core["num_running_reqs"] for core in cores),
        waiting=sum(core["num_waiting_reqs"] for core in cores),
        tokens_per_s=sum(core["gen_throughput"] for core in cores),
        votes=votes or {},
    )


def votes_of(text: str) -> dict[float, float]:
    """Upper bound -> slots, ascending, of what /metrics says."""
    found: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == VOTES:
                bound = float(sample.labels["le"])
                found[bound] = found.get(bound, 0.0) + sample.value
    return dict(sorted(found.items()))


def _sums(parts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of what is a number; the rest is left out."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, int | float):
                total[name] = total.get(name, 0) + value
    return total
