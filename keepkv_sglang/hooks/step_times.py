"""What the scheduler's steps cost, by kind and by requests in the batch: for benchmarks, with KeepKV or without it.

Off unless KEEPKV_STEP_TIMES=1 is in the server's environment; nothing of SGLang is wrapped otherwise. Then
/server_info shows `step_times` beside the scheduler's state. `keepkv bench agents` reads it before and after a run.

The seconds are those that Scheduler.run_batch blocks. On a CPU that is the forward pass; on a GPU the call only
enqueues the work, so there the counts hold and the seconds do not.
"""

from __future__ import annotations

import os
import time
from typing import Any

VARIABLE = "KEEPKV_STEP_TIMES"
KEY = "step_times"

# kind -> requests in the batch -> [steps, seconds, tokens]
_steps: dict[str, dict[int, list[float]]] = {"prefill": {}, "decode": {}}


def wanted() -> bool:
    """Whether this process was started with KEEPKV_STEP_TIMES=1."""
    return os.environ.get(VARIABLE) == "1"


def around_run_batch(original: Any, self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Scheduler.run_batch. Counted under its kind: "decode", or "prefill" for everything that extends a row.

    Requests of a decode step that have ended already, which an overlapped batch still lists, are not counted.
    """
    is_decode = batch.forward_mode.is_decode()
    count = sum(not req.finished() for req in batch.reqs) if is_decode else len(batch.reqs)
    tokens = count if is_decode else int(batch.extend_num_tokens or 0)
    began = time.perf_counter()
    result = original(self, batch, *args, **kwargs)
    cell = _steps["decode" if is_decode else "prefill"].setdefault(count, [0, 0.0, 0])
    cell[0] += 1
    cell[1] += time.perf_counter() - began
    cell[2] += tokens
    return result


def after_get_internal_state(result: Any, self: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER Scheduler.get_internal_state: `step_times` in /server_info, counts as text because JSON keys are text."""
    result.internal_state[KEY] = {
        kind: {str(count): list(cell) for count, cell in cells.items()} for kind, cells in _steps.items()
    }
    return result
