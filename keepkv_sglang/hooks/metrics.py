"""Numbers for people who watch the server: /metrics where --enable-metrics asks for it, and one log line a minute."""

from __future__ import annotations

import logging
from typing import Any

from keepkv_sglang.faults import guard
from keepkv_sglang.faults.guard import guarded
from keepkv_sglang.observe.metrics import Kinds, Metrics
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.runtime.watched import Watched

logger = logging.getLogger("keepkv")


def start(rt: Runtime, scheduler: Any) -> None:
    """After Scheduler.__init__: with --enable-metrics, our metrics beside SGLang's, with its labels, in its registry.

    As SGLang does, the first rank of tensor parallelism alone, or all with --enable-metrics-for-all-schedulers.
    """
    context = scheduler.metrics_collector_context
    if not context.current_scheduler_metrics_enabled:
        return
    # Here: SGLang sets PROMETHEUS_MULTIPROC_DIR, which the import reads, and where metrics are off it is not needed.
    import prometheus_client

    theirs = context.collector
    kinds = Kinds(
        theirs._counter_cls or prometheus_client.Counter,
        theirs._gauge_cls or prometheus_client.Gauge,
        theirs._histogram_cls or prometheus_client.Histogram,
    )
    rt.watched, rt.metrics = Watched(), Metrics(kinds, theirs.labels)
    rt.metrics.update(rt, guard.errors.total())


@guarded()
def answered(rt: Runtime) -> None:
    """Answers are about to leave: whoever has one finds it in /metrics."""
    if rt.metrics is not None:
        rt.metrics.update(rt, guard.errors.total())


@guarded()
def between_steps(rt: Runtime) -> None:
    """Call it often, also while nothing runs."""
    if rt.metrics is not None:
        rt.metrics.look(rt, guard.errors.total())
    if rt.rank == 0 and (said := rt.summary.look(rt.counters)) is not None:
        logger.info(said)
