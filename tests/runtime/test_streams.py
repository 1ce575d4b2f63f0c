"""streams.py: the order of waits around a compression."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from keepkv_sglang.runtime.streams import on_forward_stream


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def scheduler(log: list[str], overlap: bool = True):
    @contextmanager
    def forward_stream_ctx():
        log.append("enter")
        try:
            yield
        finally:
            log.append("leave")

    streams = {name: Stream(name, log) for name in ("forward_stream", "schedule_stream")}
    return SimpleNamespace(enable_overlap=overlap, forward_stream_ctx=forward_stream_ctx(), **streams)


ORDER = ["enter", "forward_stream waits for schedule_stream", "body", "leave"]


def test_the_body_waits_and_is_waited_for():
    log: list[str] = []
    with on_forward_stream(scheduler(log)):
        log.append("body")
    assert log == [*ORDER, "schedule_stream waits for forward_stream"]


def test_a_body_that_fails_is_waited_for_too():
    log: list[str] = []
    with pytest.raises(MemoryError), on_forward_stream(scheduler(log)):
        log.append("body")
        raise MemoryError
    assert log == [*ORDER, "schedule_stream waits for forward_stream"]


def test_without_overlap_there_is_one_stream():
    log: list[str] = []
    with on_forward_stream(scheduler(log, overlap=False)):
        log.append("body")
    assert log == ["body"]
