"""What `keepkv verify` says of ways that a server lacks, refuses, fails on, or answers wrongly. No server: canned
answers of one that does what is asked, but for what a test changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from keepkv_sglang.tools.remote import RefusedError, WrongError
from keepkv_sglang.tools.verify.checks import FAILED, OK, SHOWN, SKIPPED, Checks, Row
from keepkv_sglang.tools.verify.server import Answer

CONFIG = {"merge": "attention_matching", "host_ratio": 1.0, "host_size": 0.0, "unpack": 0.5}
KEEPKV = {"compressions": 1, "cached_compressed_tokens": 80, "unpacked_tokens": 90}
MUST_AGREE = {
    "off, again",
    "budget 1",
    "on, cold: first token",
    "on, a third time",
    "on, next turn, unpacked",
    "votes: merged",
    "off, cold again in a new namespace",
    "on, cold again in a new namespace",
}


def answer(moved: float, cached: int) -> Answer:
    """Log-probabilities of a next turn whose most probable token has lost `moved` nats."""
    place = {5: -0.1 - moved, 6: -3.0}
    return Answer([5, 6], [{5: -0.1}, {6: -0.2}], [-0.1 - moved], [place], cached, KEEPKV)


class CannedTalk:
    """As Talk. `change` may raise, or give another answer: (settings, namespace, is it the next turn, the answer)."""

    def __init__(
        self, change: Callable[..., Answer] = lambda settings, namespace, is_next, found: found, **config: Any
    ):
        self.server = SimpleNamespace(keepkv={"config": {**CONFIG, **config}})
        self._change, self._seen = change, set[str]()
        self.full, self.full_next = self.first({"enabled": False}, "off"), self.second({"enabled": False}, "off")

    def first(self, settings: Mapping[str, Any], namespace: str) -> Answer:
        cached = 60 if namespace in self._seen else 0
        self._seen.add(namespace)
        return self._change(settings, namespace, False, answer(0.0, cached))

    def second(self, settings: Mapping[str, Any], namespace: str) -> Answer:
        moved = 0.0
        if settings.get("budget", 1) != 1 and "unpack" in settings:  # reads compressed tokens
            moved = 1.0 if settings.get("merge") == "evict" else 0.01
        return self._change(settings, namespace, True, answer(moved, 60))


def rows(talk: CannedTalk) -> dict[str, Row]:
    return {row.what: row for row in Checks(talk, 0.2, 1e-3, flush=False).rows()}  # type: ignore[arg-type]


def test_a_server_that_does_what_is_asked():
    found = rows(CannedTalk())
    assert {what for what, row in found.items() if row.verdict == OK} == MUST_AGREE
    assert {what for what, row in found.items() if row.verdict == SHOWN} == set(found) - MUST_AGREE


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"host_ratio": 0.0}, "the server keeps no originals (--keepkv-host-ratio)"),
        ({"unpack": 0.0}, "the server reads no originals (--keepkv-unpack 0)"),
    ],
)
def test_a_server_without_originals(config: dict[str, float], note: str):
    found = rows(CannedTalk(**config))
    row = found.pop("on, next turn, unpacked")
    assert (row.verdict, row.note) == (SKIPPED, note)
    assert {row.verdict for row in found.values()} == {OK, SHOWN}


def test_what_the_server_refuses_is_skipped_and_says_why():
    def change(settings: Mapping[str, Any], namespace: str, is_next: bool, found: Answer) -> Answer:
        if settings.get("merge") == "evict":
            raise RefusedError("HTTP 400 on /generate: merge goes beyond what this server allows a request")
        return found

    found = rows(CannedTalk(change))
    row = found.pop("votes: merged")
    assert row.verdict == SKIPPED and "beyond what this server allows" in row.note
    assert {row.verdict for row in found.values()} == {OK, SHOWN}


def test_what_the_server_fails_on_is_a_failure_of_that_way_alone():
    def change(settings: Mapping[str, Any], namespace: str, is_next: bool, found: Answer) -> Answer:
        if settings.get("budget") == 1:
            raise WrongError("HTTP 500 on /generate: KeepKV failed on this request")
        return found

    found = rows(CannedTalk(change))
    row = found.pop("budget 1")
    assert row.verdict == FAILED and "HTTP 500" in row.note
    assert FAILED not in {row.verdict for row in found.values()}


def test_dropping_that_changes_nothing_says_nothing_of_votes():
    def change(settings: Mapping[str, Any], namespace: str, is_next: bool, found: Answer) -> Answer:
        return answer(0.001, found.cached) if settings.get("merge") == "evict" and is_next else found

    assert rows(CannedTalk(change))["votes: merged"].verdict == SKIPPED


@pytest.mark.parametrize(
    ("name", "keepkv", "failed"),
    [
        ("nothing was compressed", {**KEEPKV, "compressions": 0}, "on, cold: first token"),
        ("cached_compressed_tokens is 0", {**KEEPKV, "cached_compressed_tokens": 0}, "on, again"),
        ("unpacked_tokens is 0", {**KEEPKV, "unpacked_tokens": 0}, "on, next turn, unpacked"),
    ],
)
def test_a_way_that_was_not_taken_is_a_failure(name: str, keepkv: dict[str, int], failed: str):
    def change(settings: Mapping[str, Any], namespace: str, is_next: bool, found: Answer) -> Answer:
        return Answer(found.ids, found.top, found.given, found.given_top, found.cached, keepkv)

    row = rows(CannedTalk(change))[failed]
    assert row.verdict == FAILED and name in row.note
