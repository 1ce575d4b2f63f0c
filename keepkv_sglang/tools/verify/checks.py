"""The ways one conversation is asked for, which of them must agree, and whether votes act.

What cannot be asked, since the server refuses or lacks it, is a row that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from keepkv_sglang.tools.remote import RefusedError, WrongError
from keepkv_sglang.tools.verify.compare import Difference, difference, divergence
from keepkv_sglang.tools.verify.server import Answer
from keepkv_sglang.tools.verify.talk import FULL, Talk

Pairs = Sequence[tuple[Answer, Answer]]
OK, FAILED, SKIPPED, SHOWN = "ok", "FAILED", "skipped", "may differ"
# The votes' merge rule and the one without votes: the same tokens keep a slot, what is left over is dropped.
MERGED, DROPPED = "attention_matching", "evict"
VOTES_MOST = 0.25
"""With votes the KL of merging to the full cache is less than this share of that of dropping. Measured on both sides:
docs/log.md, 2026-11-27."""
TELLING = 0.005
"""The least KL of dropping, in nats, that says something about votes."""
FITTED = 10
"""Two compressions of the same tokens: the fit of attention_matching amplifies rounding, so they may be so many
tolerances apart (tests/server/test_replay.py has the measured factor)."""


@dataclass(frozen=True)
class Row:
    """One comparison. what, against: the ways; verdict: OK, FAILED, SKIPPED or SHOWN; note: why, in a few words."""

    what: str
    against: str
    verdict: str
    note: str
    difference: Difference | None = None


class Checks:
    """All comparisons of one run. budget: of the compressed ways, whose other settings are the server's. tolerance:
    most difference in log-probability of ways that must agree, in nats. flush: whether the server's prefix cache may be
    emptied."""

    def __init__(self, talk: Talk, budget: float | int, tolerance: float, flush: bool) -> None:
        self.talk, self.tolerance, self.flush = talk, tolerance, flush
        self.on: Mapping[str, Any] = {"budget": budget, "unpack": False}

    def rows(self) -> Iterator[Row]:
        """Each comparison when it is made. What empties the cache comes last."""
        checks = (
            ("off, again", "off", self._again),
            ("budget 1", "off", self._budget_1),
            ("on, cold: first token", "off", self._first_token),
            ("on, again", "off", self._hit),
            ("on, a third time", "on, again", self._third),
            ("on, next turn", "off", self._next),
            ("on, next turn, unpacked", "off", self._unpacked),
            ("votes: merged", "dropped", self._votes),
            (self._cold("off"), "off", self._full_cold_again),
            (self._cold("on"), "on, cold", self._on_cold_again),
        )
        for what, against, check in checks:
            try:
                yield replace(check(), what=what, against=against)
            except RefusedError as error:
                yield Row(what, against, SKIPPED, str(error))
            except WrongError as error:
                yield Row(what, against, FAILED, str(error))

    def _cold(self, way: str) -> str:
        return f"{way}, flushed, cold again" if self.flush else f"{way}, cold again in a new namespace"

    # -- ways ---------------------------------------------------------------------------------------------------------

    @cached_property
    def cold(self) -> Answer:
        """The first answer with compression: its first token still reads the uncompressed prompt."""
        answer = self.talk.first(self.on, "on")
        _want(answer.keepkv["compressions"] >= 1, f"nothing was compressed: {dict(answer.keepkv)}")
        return answer

    @cached_property
    def hit(self) -> Answer:
        """The same again, on the compressed prompt."""
        _ = self.cold
        return _found(self.talk.first(self.on, "on"), "cached_compressed_tokens")

    @cached_property
    def next(self) -> Answer:
        """The next turn on the compressed prompt and reply."""
        _ = self.cold
        return _found(self.talk.second(self.on, "on"), "cached_compressed_tokens")

    # -- comparisons --------------------------------------------------------------------------------------------------

    def _again(self) -> Row:
        _ = self.talk.full
        again = self.talk.first(FULL, "off")
        _want(again.cached > 0, "nothing of the prompt was found in the prefix cache; is the pool too busy?")
        return self._agree([(again, self.talk.full)])

    def _budget_1(self) -> Row:
        one = {"budget": 1}
        pairs = [(self.talk.first(one, "one"), self.talk.full), (self.talk.second(one, "one"), self.talk.full_next)]
        return self._agree(pairs)

    def _first_token(self) -> Row:
        return self._agree([(self.cold, self.talk.full)], generated=1)

    def _hit(self) -> Row:
        return self._shown([(self.hit, self.talk.full)])

    def _third(self) -> Row:
        _ = self.hit
        return self._agree([(_found(self.talk.first(self.on, "on"), "cached_compressed_tokens"), self.hit)])

    def _next(self) -> Row:
        return self._shown([(self.next, self.talk.full_next)])

    def _unpacked(self) -> Row:
        config = self.talk.server.keepkv["config"]
        if not (config["host_ratio"] > 0 or config["host_size"] > 0):
            raise RefusedError("the server keeps no originals (--keepkv-host-ratio)")
        if not config["unpack"] > 0:
            raise RefusedError("the server reads no originals (--keepkv-unpack 0)")
        settings = {key: value for key, value in self.on.items() if key != "unpack"}
        self.talk.first(settings, "unpacked")
        return self._agree([(_found(self.talk.second(settings, "unpacked"), "unpacked_tokens"), self.talk.full_next)])

    def _votes(self) -> Row:
        full = self.talk.full_next
        own = self.talk.server.keepkv["config"]["merge"] == MERGED
        merged = self.next if own else self._next_of("merged", MERGED)
        found, without = (divergence(full, answer) for answer in (merged, self._next_of("dropped", DROPPED)))
        if without < TELLING:
            raise RefusedError(f"dropping moves the answer by a KL of only {without:.4f}: too little to tell")
        note = f"KL {found:.4f}, {found / without:.2f} of {without:.4f}; with votes below {VOTES_MOST}"
        return Row("", "", OK if found < VOTES_MOST * without else FAILED, note, difference([(merged, full)]))

    def _next_of(self, namespace: str, merge: str) -> Answer:
        settings = {**self.on, "merge": merge}
        self.talk.first(settings, namespace)
        return _found(self.talk.second(settings, namespace), "cached_compressed_tokens")

    def _full_cold_again(self) -> Row:
        return self._agree([(self._asked_cold(FULL, "off"), self.talk.full)])

    def _on_cold_again(self) -> Row:
        first = self.cold
        return self._agree([(self._asked_cold(self.on, "on"), first)], most=FITTED * self.tolerance)

    def _asked_cold(self, settings: Mapping[str, Any], namespace: str) -> Answer:
        if self.flush:
            self.talk.server.flush()
        answer = self.talk.first(settings, namespace if self.flush else f"{namespace}-2")
        _want(answer.cached == 0, f"{answer.cached} tokens were found in a cache that should be empty")
        return answer

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _agree(self, pairs: Pairs, most: float | None = None, generated: int | None = None) -> Row:
        found, most = difference(pairs, generated), most or self.tolerance
        return Row("", "", OK if found.worst <= most else FAILED, f"must agree, to {most:g}", found)

    def _shown(self, pairs: Pairs) -> Row:
        return Row("", "", SHOWN, "reads compressed tokens", difference(pairs))


def _want(condition: bool, otherwise: str) -> None:
    if not condition:
        raise WrongError(otherwise)


def _found(answer: Answer, what: str) -> Answer:
    _want(answer.keepkv[what] > 0, f"{what} is 0, so this was no hit: {dict(answer.keepkv)}")
    return answer
