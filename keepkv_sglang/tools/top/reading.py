"""One look at a server: what /server_info, /v1/loads and, where it is on, /metrics say."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from keepkv_sglang.observe.families import VOTES

TIMEOUT_S = 10.0


class Unreachable(ValueError):
    """Nothing at this address answers as an SGLang server does."""


class KeepKVOff(ValueError):
    """An SGLang server without KeepKV."""


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


class Server:
    """A server by its address. key: of --api-key, or None."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._session = requests.Session()
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def read(self) -> Reading:
        """Raises Unreachable, KeepKVOff."""
        info, loads = self._json("/server_info"), self._json("/v1/loads?include=core")
        votes = votes_of(self._get("/metrics").text) if info.get("enable_metrics") else {}
        return reading_of(self.url, info, loads, votes)

    def _json(self, path: str) -> dict[str, Any]:
        try:
            answer = self._get(path).json()
        except requests.JSONDecodeError:
            raise Unreachable(f"{self.url}{path} gave no JSON; is this the address of an SGLang server?") from None
        if not isinstance(answer, dict):
            raise Unreachable(f"{self.url}{path} gave {type(answer).__name__}; is this an SGLang server?")
        return answer

    def _get(self, path: str) -> requests.Response:
        try:
            answer = self._session.get(self.url + path, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise Unreachable(f"no server answers at {self.url}: {_reason(error)}") from None
        if answer.status_code == 401:
            raise Unreachable(f"the server at {self.url} wants its key: give --api-key")
        if not answer.ok:
            raise Unreachable(f"{self.url}{path} answered HTTP {answer.status_code}; is this an SGLang server?")
        return answer


def reading_of(
    url: str, info: Mapping[str, Any], loads: Mapping[str, Any], votes: Mapping[float, float] | None = None
) -> Reading:
    """Of the answers themselves. Raises KeepKVOff."""
    states = [state["keepkv"] for state in info.get("internal_states", ()) if "keepkv" in state]
    if not states:
        raise KeepKVOff(f"the server at {url} runs without KeepKV; start it with --enable-keepkv")
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


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return f"not within {TIMEOUT_S:.0f} s"
    if isinstance(error, requests.ConnectionError):
        return "connection refused" if "refused" in str(error) else "it cannot be reached"
    return str(error)
