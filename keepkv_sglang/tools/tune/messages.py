"""Conversations in JSON lines as the evaluator's items and as the simulator's workload, both of the same tokens.

A line is an object with `messages`, as chat endpoints take them. Where the last one is the assistant's, the line is a
whole conversation, and each of the assistant's messages is the reply to a request. Else the line is one request, and
its reply is `reply`, a text. `timestamp` says when the (first) request came, in seconds. Of a message its role and its
text are read, so tool calls without a text are left out.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.evaluate.conversation import Message, message, pieces
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.turns import Item, item_of
from keepkv_sglang.tools.simulate.traces import BORDER, Request, Workload
from keepkv_sglang.turn.anchor import message_border

Parts = list[tuple[list[Message], bool]]


@dataclass(frozen=True)
class Talk:
    """One line. parts: what comes before a reply and the reply, in turn (conversation.pieces). time: in seconds, None
    where the line does not say."""

    parts: Parts
    time: float | None


def is_messages(path: Path) -> bool:
    """Whether a trace's first line holds messages."""
    if path.suffix != ".jsonl":
        return False
    with path.open() as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and "messages" in row


def read(path: Path) -> list[Talk]:
    """ValueError for a line that is something else, with its number."""
    talks = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    talks.append(_talk(json.loads(line)))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}: {error!r}; give an object with messages") from error
    return talks


def _talk(row: Mapping[str, Any]) -> Talk:
    said = [message(str(m["role"]), _text(m.get("content"))) for m in row["messages"]]
    if not said:
        raise ValueError("no messages")
    time = float(row["timestamp"]) if row.get("timestamp") is not None else None
    if said[-1]["role"] != "assistant":
        if not row.get("reply"):
            raise ValueError("the last message is not the assistant's, and there is no reply")
        return Talk([(said, True), ([message("assistant", str(row["reply"]))], False)], time)
    parts: Parts = []
    waiting: list[Message] = []
    for one in said:
        if one["role"] == "assistant" and waiting:
            parts += [(waiting, True), ([one], False)]
            waiting = []
        else:
            waiting.append(one)
    if not parts:
        raise ValueError("nothing comes before the assistant's message")
    return Talk(parts, time)


def _text(content: Any) -> str:
    """A message's text: of content in parts, the text parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def items(probe: Probe, talks: Sequence[Talk]) -> list[Item]:
    """Token ids of every turn. ValueError for a chat template that cannot be cut (conversation.pieces)."""
    return [item_of(probe, number, "trace", pieces(probe, talk.parts)) for number, talk in enumerate(talks)]


def workload(probe: Probe, talks: Sequence[Talk], made: Sequence[Item], every_s: float) -> Workload:
    """The requests of all turns at scale 1. every_s: seconds between conversations, and between the turns of one, where
    the trace has no times; a turn always waits for the reply before it."""
    border = message_border(probe.tokenizer)
    ends = border.token if border is not None else -1
    times = [talk.time if talk.time is not None else number * every_s for number, talk in enumerate(talks)]
    made_of: list[tuple[float, int, int]] = []  # when, conversation, turn
    for item, time in zip(made, times, strict=True):
        made_of += [(time - min(times) + turn * every_s, item.number, turn) for turn in range(len(item.turns))]
    made_of.sort()
    places = {(number, turn): index for index, (_, number, turn) in enumerate(made_of)}
    histories: dict[int, array[int]] = {}
    work = Workload(1, [], [], [])
    for time, number, turn in made_of:
        # The simulator's border is one token, BORDER = 0: all others are counted from 1.
        asked, said = (
            array("q", [BORDER if token == ends else token + 1 for token in part]) for part in made[number].turns[turn]
        )
        prompt = histories.get(number, array("q")) + asked
        histories[number] = prompt + said
        parent = places.get((number, turn - 1), -1)
        work.requests.append(Request(time, len(prompt), len(said), (), (), 1, made[number].anchor, parent=parent))
        work.prompts.append(prompt)
        work.replies.append(said)
    return work
