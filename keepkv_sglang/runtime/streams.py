"""On which CUDA stream compression runs. On a CPU SGLang's streams do nothing, and neither does this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_forward_stream(scheduler: Any) -> Iterator[None]:
    """Runs its body on the stream of the model's forwards, where SGLang's overlap schedule has one of its own: behind
    the forward in flight, which still reads what the body writes.

    Waits in both directions, on the device. Before: the body reads index tensors that the schedule stream makes.
    Behind: the schedule stream's allocator gives their memory away as soon as Python drops them, and what the body
    found is read there. So the steps after a compression are scheduled behind it; without one nothing waits. Not
    reentrant, as SGLang's context is not.
    """
    if not scheduler.enable_overlap:
        yield
        return
    try:
        with scheduler.forward_stream_ctx:
            scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
            yield
    finally:
        scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
