"""Hooks that add our numbers to what leaves the scheduler's process."""

from __future__ import annotations

from typing import Any

from keepkv_sglang.faults import guard
from keepkv_sglang.faults.guard import guarded
from keepkv_sglang.hooks import metrics
from keepkv_sglang.observe.answer import count, info
from keepkv_sglang.observe.snapshot import snapshot
from keepkv_sglang.runtime import process, record
from keepkv_sglang.runtime.requests import REQUEST_KEY


@guarded()
def after_get_internal_state(result: Any, self: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER Scheduler.get_internal_state: our numbers in /server_info."""
    rt = process.active()
    if rt is not None:
        result.internal_state["keepkv"] = {**snapshot(rt), "errors": dict(guard.errors)}
    return result


def after_get_output_streamer_class(cls: Any, self: Any) -> Any:
    """AFTER Scheduler.get_output_streamer_class: meta_info["keepkv"] with the last output of a request."""
    config = process.configured()
    if config is None or not config.enabled:
        return cls
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX  # start-up cost: seams.py loads this file everywhere

    def probe(req: Any) -> bool:
        return str(req.rid).startswith(HEALTH_CHECK_RID_PREFIX)

    class KeepKVOutputStreamer(cls):
        __slots__ = ()
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list]:
            found = dict(super().build_additional_customized_info(reqs))
            if any(req.finished() for req in reqs):
                found[REQUEST_KEY] = [[_info(req, probe(req))] if req.finished() else [] for req in reqs]
                metrics.answered(process.current())
            return found

    return KeepKVOutputStreamer


@guarded(lambda error, *_: {"enabled": False, "reason": f"unknown: {type(error).__name__}"})
def _info(req: Any, probe: bool) -> dict[str, Any]:
    """probe: SGLang's own request, of a client of /health. They come every few seconds and are no traffic."""
    rt = process.current()
    said = info(rt, req)
    if not probe:
        count(rt, req, said)
        record.finish(rt, req, said)
    return said
