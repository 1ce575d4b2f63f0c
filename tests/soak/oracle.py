"""What a quiet server answers, and whether an answer under load agrees with it.

Asked before the load begins, of the same process: what is always wrong, it cannot see (tests/server/test_replay.py
compares with float64). It sees what the load does to a server that was right.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.client import Answer, body, flush, generate
from tests.support.isolation import seen

OFF = {"enabled": False}
NEW = 12
PROMPTS = 8
BOUND = 2e-4
"""Of a log-probability: float32 sums, in another order with every batch, chunk and cached prefix."""
TALKS: tuple[dict[str, Any] | None, ...] = (
    None, {"heads": "uniform", "unpack": False}, {"budget": 60, "unpack": 0.001}, {"unpack": False},
    {"heads": "uniform"}, {"merge": "evict", "scorer": "snapkv", "heads": "uniform"},
    {"protect": "30-60", "budget": 0.4},
)  # fmt: skip
"""Packed spans and others, slots and fractions; histories unpacked, streamed and read compressed."""


@dataclass(frozen=True)
class Quiet:
    """One prompt, uncompressed: NEW tokens; gaps: how far the second most probable token was behind; inputs: of the
    prompt's tokens."""

    ids: list[int]
    answer: list[int]
    logprobs: list[float]
    gaps: list[float]
    inputs: list[float]


@dataclass(frozen=True)
class Talk:
    """Two turns of a conversation that is compressed: prompt, tokens of the reply, what is added, settings."""

    first: list[int]
    new: int
    more: list[int]
    keepkv: dict[str, Any] | None


class Oracle:
    """prompts: what uncompressed requests ask. talks: what is asked again, compressed, in quiet moments."""

    def __init__(self, server: ServerProcess, texts: list[list[int]], seed: int, small: bool) -> None:
        """small: half of the prompts and talks, for short runs."""
        rng = random.Random(f"oracle {seed}")
        self.server = server
        self.prompts = [
            self._ask(text[: rng.randrange(80, 260)]) for text in rng.sample(texts, PROMPTS // 2 if small else PROMPTS)
        ]
        self.talks = []
        for keepkv in TALKS[: len(TALKS) // 2 if small else None]:
            text, cut = rng.choice(texts), rng.randrange(120, 220)
            self.talks.append(Talk(text[:cut], rng.choice((4, 40)), text[cut : cut + 80], keepkv))
        self._talked = [self._talk(talk) for talk in self.talks]
        flush(server)

    def _ask(self, ids: list[int]) -> Quiet:
        """A prompt of the texts, read whole."""
        made = generate(self.server, ids, NEW, OFF, logprob_start_len=0, top_logprobs_num=2)
        top = made.meta["output_top_logprobs"]
        inputs = [entry[0] for entry in made.meta["input_token_logprobs"][1:]]
        return Quiet(ids, made.ids, made.logprobs, [one[0][0] - one[1][0] for one in top], inputs)

    def _talk(self, talk: Talk) -> tuple[Any, ...]:
        """Both turns of a talk, in an empty cache."""
        flush(self.server, faults=True)
        one = generate(self.server, talk.first, talk.new, talk.keepkv)
        two = generate(self.server, talk.first + one.ids + talk.more, talk.new, talk.keepkv)
        return seen(one), seen(two)

    def worst(self, quiet: Quiet, answer: Answer) -> float:
        """Largest difference of a log-probability. Where another token came although the quiet server had no near tie
        there, infinity; behind a near tie nothing can be compared."""
        worst = 0.0
        for at, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            worst = max(worst, abs(logprob - quiet.logprobs[at]))
            if token != quiet.answer[at]:
                return worst if quiet.gaps[at] <= 2 * BOUND else float("inf")
        return worst

    def check_quiet(self, compressed: bool) -> float:
        """In a quiet moment: the same answers as before the load; compressed ones bit for bit, in an empty cache."""
        worst = 0.0
        for quiet in self.prompts:
            apart = self.worst(quiet, generate(self.server, quiet.ids, NEW, OFF))
            assert apart <= BOUND, f"an uncompressed prompt of {len(quiet.ids)} tokens is {apart:.2g} off, nothing runs"
            worst = max(worst, apart)
        for talk, expected in zip(self.talks, self._talked, strict=True) if compressed else ():
            made = self._talk(talk)
            assert made == expected, f"a compressed conversation {talk.keepkv} is another one: {_apart(expected, made)}"
        return worst


def _apart(expected: tuple[Any, ...], made: tuple[Any, ...]) -> str:
    """Where two talks differ, in words."""
    for turn, (one, other) in enumerate(zip(expected, made, strict=True)):
        for what, a, b in zip(("tokens", "log-probabilities", "cached", "numbers"), one, other, strict=True):
            if a != b:
                pairs = zip(a, b, strict=False) if isinstance(a, list) else ()
                first = next((f" from token {at} on" for at, (x, y) in enumerate(pairs) if x != y), f" {a} {b}")
                return f"turn {turn + 1}, {what}{first}"
    return "nowhere"


_salts = itertools.count()


def alone(request: dict[str, Any]) -> dict[str, Any]:
    """The same request, in a namespace that nobody else has."""
    return request | {"cache_salt": f"alone {next(_salts)}"}


def uncompressed(quiet: Quiet) -> dict[str, Any]:
    return body(quiet.ids, NEW, OFF)
