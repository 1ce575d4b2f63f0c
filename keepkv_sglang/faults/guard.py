"""What an error of ours does on the scheduler's thread: it fails a request or skips a round, never the server.

Every hook that SGLang calls there is `guarded`. The table says what happens instead of it when it raises:

| hook | then |
|---|---|
| get_new_batch_prefill, update_running_batch, prepare_for_decode | the round is skipped: nothing is compressed |
| compression of one span, inside these | the request goes on uncompressed, or fails if the pool cannot hold it so |
| whatever else is done there for one request | that request fails (HTTP 500) |
| stash_chunked_request | that request fails |
| init_req_max_new_tokens (resolves a request's settings) | that request fails |
| _prefix_kv_indices, alloc_for_extend, prepare_for_extend | the batch being built fails, all others go on |
| ForwardBatch.init_new | requests of this step that have compressed slots fail |
| release_kv_cache | nothing is published, SGLang frees the row |
| archiving originals, unpacking them | these are missing; the prompt is read over its compressed match |
| prefill adder | SGLang's own estimate counts; a prompt longer than the pool, which that would never admit, fails |
| match_prefix, touch_prefix, checkpoint of the cache | SGLang's own match counts, ages are not noted |
| get_internal_state, output streamer, on_idle | the number is missing |

An error of SGLang's own, raised inside what we wrap, goes on its way unchanged. `errors` counts ours by hook; the log
has the first traceback of each.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("keepkv")

errors: Counter[str] = Counter()
GUARDED: dict[str, Any] = {}
"""Every guarded hook by name; `.inner` is the function itself, which tests replace by one that raises."""

Otherwise = Callable[..., Any]


class BatchError(Exception):
    """The batch that is being built cannot run: raised through SGLang to `admission.around_get_new_batch_prefill`."""


class Original:
    """The function that an AROUND hook wraps. Knows whether it ran, what it returned, and what it raised."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.called = False
        self.error: BaseException | None = None
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        try:
            self.result = self.function(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        return self.result


def note(name: str, error: BaseException) -> None:
    """Counts an error; logs the traceback of the first of its kind, then a line for the 10th, 100th, ..."""
    errors[name] += 1
    count = errors[name]
    if count == 1:
        logger.error("KeepKV: %s failed: %r", name, error, exc_info=error)
    elif count == 10 ** (len(str(count)) - 1):
        logger.error("KeepKV: %s failed %d times, now: %r", name, count, error)


def leave_out(_error: Exception, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE and AFTER hooks: as if the hook were not there."""


def fail_batch(error: Exception, *_args: Any, **_kwargs: Any) -> Any:
    """Hooks whose work cannot be left out of a batch that is being built."""
    raise BatchError(f"{type(error).__name__}: {error}") from error


def guarded(otherwise: Otherwise = leave_out) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a BEFORE or AFTER hook, or a method: otherwise(error, *args, **kwargs) gives the result instead."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def hook(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook.inner(*args, **kwargs)  # type: ignore[attr-defined]
            except BatchError:
                raise
            except Exception as error:
                note(function.__name__, error)
                return otherwise(error, *args, **kwargs)

        hook.inner = function  # type: ignore[attr-defined]
        GUARDED[function.__name__] = hook
        return hook

    return wrap


def guarded_around(otherwise: Otherwise | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of an AROUND hook. When it raises, the original still runs, once; its own errors pass.

    otherwise(error, *args, **kwargs): what else is done before the original runs.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            tracked = Original(original)
            try:
                return hook.inner(tracked, *args, **kwargs)  # type: ignore[attr-defined]
            except BatchError:
                raise
            except Exception as error:
                if error is tracked.error:
                    raise
                note(function.__name__, error)
                if otherwise is not None:
                    otherwise(error, *args, **kwargs)
                return tracked.result if tracked.called else original(*args, **kwargs)

        hook.inner = function  # type: ignore[attr-defined]
        GUARDED[function.__name__] = hook
        return hook

    return wrap
