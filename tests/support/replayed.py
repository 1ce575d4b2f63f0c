"""A server's compressed turns held against the float64 replay (replay.py): the checks that several models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.client import Answer, flush, generate, numbers
from tests.support.replay import Replay, events_of

FLAGS = ("--enable-keepkv", "--keepkv-budget", "0.2", "--keepkv-interval", "32", "--max-total-tokens", "6000")
BOUND = 1e-4
BOUND_FITTED = 3e-3
STRICT_RULE = {"merge": "least_squares", "references": 0}  # fits nothing across slots: the strict bound holds
Prefilled = tuple[Replay, torch.Tensor]
"""The replay of a prompt of 300 tokens, and its last log-probabilities."""


def worst(answer: Answer, first: torch.Tensor, rest: list[float]) -> float:
    expected = [first[answer.ids[0]].item(), *rest]
    return max(abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True))


def next_turn(
    server: Any, record: Path, prompt: list[int], prefilled: Prefilled, text: list[int], params: dict, bound: float
) -> None:
    """A turn as compressed() has it, and one behind it; text: at least 620 tokens."""
    answer, row = compressed(server, record, prompt, prefilled, params, bound)
    # The next turn extends the matched entries; the raw tail of the reply is compressed with its prompt.
    turn2 = prompt + answer.ids + text[500:620]
    second = generate(server, turn2, 65, params)
    assert second.keepkv["cached_compressed_tokens"] == second.cached >= 364
    row.truncate(second.cached)
    first2 = row.feed(turn2[second.cached :])[-1]
    assert worst(second, first2, row.follow(second.ids, events_of(record, second.rid))) <= bound
    numbers(server)


def compressed(
    server: Any, record: Path, prompt: list[int], prefilled: Prefilled, params: dict, bound: float
) -> tuple[Answer, Replay]:
    """A prompt and a reply that are compressed three times: checked against the replay, which is returned."""
    flush(server)  # another test may have left this prompt, compressed by the same rule
    answer = generate(server, prompt, 65, params)
    events = events_of(record, answer.rid)
    assert [event["end"] for event in events] == [299, 331, 363]
    assert [event["references"] for event in events] == [params["references"], 0, 0]
    assert answer.keepkv["compressions"] == 3
    row, first = prefilled[0].clone(), prefilled[1]
    assert worst(answer, first, row.follow(answer.ids, events)) <= bound
    return answer, row
