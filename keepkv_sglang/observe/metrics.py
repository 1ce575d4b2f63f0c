"""Keeps /metrics up to date: the families, histograms of single compressions, and errors of ours.

prometheus_client's classes and the labels are handed in: they are those of SGLang's own collector (hooks/metrics.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from keepkv_sglang.observe.families import ERRORS, GAUGES, SECONDS, TOTALS, VOTES, Family, Read
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.watched import KINDS, Watched

LOOK_EVERY_S = 1.0
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of compression_seconds."""


@dataclass(frozen=True)
class Kinds:
    """Counter, Gauge and Histogram of prometheus_client, or what SGLang was told to use instead."""

    counter: Callable[..., Any]
    gauge: Callable[..., Any]
    histogram: Callable[..., Any]


@dataclass
class _Total:
    """A series that only grows. said: what it shows."""

    child: Any
    said: float = 0

    def show(self, now: float) -> None:
        if now != self.said:
            self.child.inc(now - self.said)
            self.said = now


class Metrics:
    """Of one scheduler process. Every series is there from the beginning, with 0. clock: seconds that only grow."""

    def __init__(self, kinds: Kinds, labels: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._labels, self._clock, self._next = dict(labels), clock, 0.0
        names = [*self._labels]
        totals = [(family, kinds.counter(family.full_name, family.help, self._names(family))) for family in TOTALS]
        gauges = [
            (family, kinds.gauge(family.full_name, family.help, self._names(family), multiprocess_mode="mostrecent"))
            for family in GAUGES
        ]
        self._totals = [(read, _Total(child)) for read, child in self._children(totals)]
        self._gauges = [*self._children(gauges)]
        errors = kinds.counter(ERRORS, "Errors of ours; /server_info and the log say where.", names)
        self._errors = _Total(errors.labels(**self._labels))
        seconds = kinds.histogram(
            SECONDS, "Seconds that one compression held the scheduler.", [*names, "kind"], buckets=BUCKETS
        )
        self._seconds = {kind: seconds.labels(**self._labels, kind=kind) for kind in KINDS}
        votes = kinds.counter(
            VOTES,
            "Slots that compressions wrote, by votes: gt < votes <= le (mean over layers and kv heads).",
            [*names, "gt", "le"],
        )
        bounds = ["0", *(f"{bound:g}" for bound in Watched.bounds), "+Inf"]
        self._votes = [votes.labels(**self._labels, gt=gt, le=le) for gt, le in pairwise(bounds)]

    def look(self, rt: Runtime, errors: int) -> None:
        """Between steps, as often as you like: once in LOOK_EVERY_S everything is brought up to date."""
        if self._clock() >= self._next:
            self.update(rt, errors)

    def update(self, rt: Runtime, errors: int) -> None:
        """Brings everything up to date now. errors: how many of ours there were."""
        self._next = self._clock() + LOOK_EVERY_S
        for read, total in self._totals:
            total.show(read(rt))
        self._errors.show(errors)
        for read, gauge in self._gauges:
            gauge.set(read(rt))
        if rt.watched is not None:
            self._take(rt.watched)

    def _take(self, watched: Watched) -> None:
        for kind, seconds in watched.seconds:
            self._seconds[kind].observe(seconds)
        for spread in watched.votes:
            for bucket, count in zip(self._votes, spread, strict=True):
                bucket.inc(count)
        watched.seconds, watched.votes = [], []

    def _names(self, family: Family) -> list[str]:
        return [*self._labels, *([family.label] if family.label else [])]

    def _children(self, made: Iterable[tuple[Family, Any]]) -> list[tuple[Read, Any]]:
        return [
            (read, metric.labels(**self._labels, **({family.label: value} if family.label else {})))
            for family, metric in made
            for value, read in family.reads.items()
        ]
