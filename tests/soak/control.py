"""What an operator does to a server under load, and the errors that are injected into it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.soak.load import Soak

SHORTAGES = ("no_slots", "no_blocks")
"""The pool has no slot for a compression or an unpacking; host memory has no block. No answer is worse for it."""
ERRORS = ("merge_dies", "unpack_dies", "archive_dies")
"""MemoryError in the middle of a compression, of bringing originals back, of writing them."""

SAID = "injected into a soak"
"""By each of these errors."""


def started(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def flush_cache(soak: Soak, rng: random.Random) -> str:
    status, said = soak.server.post_json("/flush_cache", {})
    assert status in (200, 400), (status, said)
    return "flushed" if status == 200 else "not while requests run"


def pause(soak: Soak, rng: random.Random) -> str:
    """Everything stops, in mid-prompt and mid-reply, and goes on."""
    mode = rng.choice(("in_place", "in_place", "retract"))
    with soak.control:
        try:
            assert soak.server.post_json("/pause_generation", {"mode": mode})[0] == 200
            time.sleep(rng.uniform(0, 0.8))
        finally:
            assert soak.server.post_json("/continue_generation", {})[0] == 200
    return mode


def weights(soak: Soak, rng: random.Random) -> str:
    """The same weights again: between requests, or while all are retracted."""
    with soak.control:
        paused = rng.random() < 0.5
        try:
            if paused:
                assert soak.server.post_json("/pause_generation", {"mode": "retract"})[0] == 200
            status, said = soak.server.post_json("/update_weights_from_disk", {"model_path": str(soak.model)})
            assert status == 200 and said["success"], (status, said)
        finally:
            if paused:
                assert soak.server.post_json("/continue_generation", {})[0] == 200
    return "while paused" if paused else "between requests"


def abort_all(soak: Soak, rng: random.Random) -> str:
    with soak.control, soak.aborting.open():
        status, said = soak.server.post_json("/abort_request", {"abort_all": True})
        assert status == 200, said
        time.sleep(0.2)
    return "aborted"


def exhaust(soak: Soak, rng: random.Random) -> str:
    return _inject(soak, rng, rng.choice(SHORTAGES))


def break_something(soak: Soak, rng: random.Random) -> str:
    return _inject(soak, rng, rng.choice(ERRORS))


def _inject(soak: Soak, rng: random.Random, what: str) -> str:
    with soak.control, soak.injecting.open():
        try:
            soak.fault.write_text(what)
            time.sleep(rng.uniform(0.2, 2))
        finally:
            soak.fault.write_text("")
    return what
