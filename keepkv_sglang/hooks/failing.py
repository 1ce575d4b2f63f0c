"""How one request, or a batch that is being built, ends when KeepKV fails on it: an HTTP 500, and the others go on.

SGLang is imported where it is used: seams.py loads this file in every process, and those imports take seconds.
"""

from __future__ import annotations

from typing import Any

from keepkv_sglang.faults import guard


def fail(scheduler: Any, req: Any, what: str, error: Exception) -> None:
    """This request ends with an HTTP 500 in its next step; nothing of it is published. The others go on."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    guard.note(what, error)
    reason = FINISH_ABORT(
        f"KeepKV failed on this request ({type(error).__name__} in {what}); it was ended, the server goes on",
        500,
        "InternalServerError",
    )
    if req is scheduler.chunked_req and scheduler._pending_chunked_abort_req in (None, req):
        req.discard_output_reason = reason
        scheduler._pending_chunked_abort_req = req
    else:
        req.to_finish = reason


def drop_batch(scheduler: Any, reqs: list[Any], error: guard.BatchError) -> None:
    """Ends the requests of a batch that could not be built: their rows and locks are given back."""
    from sglang.srt.disaggregation.utils import prepare_abort
    from sglang.srt.managers.scheduler import _make_abort_req
    from sglang.srt.mem_cache.common import release_kv_cache

    message = f"KeepKV failed while this request's batch was built ({error}); the server goes on"
    for req in reqs:
        if req is scheduler.chunked_req:
            scheduler.chunked_req = None
        prepare_abort(req, message, 500)
        scheduler._release_aborted_request(req)
        if req.kv.holds_kv:
            release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
        elif req.lock is not None:
            scheduler.tree_cache.unlock(req.lock)
            req.lock = None
        reason = {"type": "abort", "status_code": 500, "message": message}
        scheduler.send_abort_output(_make_abort_req(req, finished_reason=reason), req)
