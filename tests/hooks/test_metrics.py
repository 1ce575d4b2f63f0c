"""Which ranks have metrics and say the line of a minute, and what is counted of whom."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace

import prometheus_client
import pytest
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollectorContext

from keepkv_sglang.hooks import answers, metrics
from tests.support.served import SYSTEM, serving, text

LABELS = {"model_name": "m", "tp_rank": 1, "priority": ""}


@pytest.fixture
def server():
    with serving() as running:
        yield running


def scheduler(enabled: bool, registry: prometheus_client.CollectorRegistry) -> SimpleNamespace:
    """SGLang's own context, with classes of a registry of the test's, as --stat-loggers may name others."""
    theirs = SimpleNamespace(labels=LABELS)
    for kind in ("Counter", "Gauge", "Histogram"):
        setattr(theirs, f"_{kind.lower()}_cls", partial(getattr(prometheus_client, kind), registry=registry))
    context = SchedulerMetricsCollectorContext(
        enable_metrics=True,
        is_stats_logging_rank=enabled,
        current_scheduler_metrics_enabled=enabled,
        enable_kv_cache_events=False,
        collector=theirs,
    )
    return SimpleNamespace(metrics_collector_context=context)


def test_a_rank_that_sglang_has_no_metrics_of_has_none_of_ours(server):
    metrics.start(server.rt, scheduler(False, prometheus_client.CollectorRegistry()))
    assert server.rt.metrics is None and server.rt.watched is None
    metrics.answered(server.rt)
    metrics.between_steps(server.rt)


def test_ours_are_made_by_sglangs_classes_with_its_labels(server):
    registry = prometheus_client.CollectorRegistry()
    metrics.start(server.rt, scheduler(True, registry))
    server.rt.counters.deferred = 3
    metrics.answered(server.rt)
    labels = {name: str(value) for name, value in LABELS.items()}
    assert registry.get_sample_value("keepkv:deferred_total", labels) == 3
    assert registry.get_sample_value("keepkv:parked_total", labels) == 0, "there from the beginning"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_says_the_line(server, rank, caplog, monkeypatch):
    server.rt.rank = rank
    monkeypatch.setattr(server.rt.summary, "look", lambda counters: "KeepKV in 60 s: something")
    with caplog.at_level(logging.INFO, logger="keepkv"):
        metrics.between_steps(server.rt)
    assert ("something" in caplog.text) == (rank == 0)


def test_requests_of_health_are_answered_and_not_counted(server):
    made = answers.after_get_output_streamer_class(SchedulerOutputStreamer, None)
    streamer = made.__new__(made)
    for rid, counted in ((f"{HEALTH_CHECK_RID_PREFIX}_1", 0), ("mine", 1)):
        req = server.admit(SYSTEM + text(500, 30))
        req.rid, req.finished = rid, lambda: True
        info = streamer.build_additional_customized_info([req])
        assert info["keepkv"][0][0]["enabled"] and server.rt.counters.answers == counted
        server.world.abort(req)
