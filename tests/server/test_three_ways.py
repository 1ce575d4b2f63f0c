"""The rules of a turn exist once: one conversation through the server, the simulator and `keepkv eval`.

All three must compress the same spans at the same borders into the same slots.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keepkv_sglang.runtime import due
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.conversation_row import ConversationRow
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.simulate.world import World
from keepkv_sglang.turn.anchor import MessageBorder
from tests.support.client import BORDER, flush, generate, tokens
from tests.support.served import Server

pytestmark = pytest.mark.server
CONFIG = KeepKVConfig(enabled=True, budget=0.25, window=16, references=32, interval=48, min_tokens=40, recent=24)
FLAGS = ("budget", "window", "references", "interval", "min_tokens", "recent")
POOL = 4000
# A system prompt; then (prompt, reply) tokens: a long reply is compressed as it grows, a short turn waits for the next.
SYSTEM = [*tokens(39, 1), BORDER]
TURNS = ((150, 20), (90, 120), (15, 10), (200, 60))
Span = tuple[int, int, int, int]  # first slot, slots, end token, slots it becomes


@pytest.fixture(scope="module")
def server(launch, record):
    flags = [part for name in FLAGS for part in ("--keepkv-" + name.replace("_", "-"), str(getattr(CONFIG, name)))]
    return launch("--enable-keepkv", *flags, "--max-total-tokens", str(POOL), "--keepkv-record", str(record))


def turns_on_the_server(server, record: Path) -> tuple[list[tuple[list[int], list[int]]], list[Span], list[int]]:
    """What was said, turn by turn, the spans that were compressed, and the slots held at each turn's end."""
    flush(server)
    history, said, held = list(SYSTEM), [], []
    for number, (prompt, reply) in enumerate(TURNS):
        asked = tokens(prompt, 10 + number)
        answer = generate(server, [*history, *asked], reply)
        history += [*asked, *answer.ids]
        said.append(([*SYSTEM, *asked] if not number else asked, answer.ids))
        held.append(answer.keepkv["slots_held"])
    files = [torch.load(path) for path in sorted(record.glob("*.pt"))]
    return said, [(f["start"], f["slots"], f["end"], f["m"]) for f in files], held


def in_the_simulator(said, monkeypatch) -> tuple[list[Span], list[int]]:
    spans, held = [], []
    real = due.compress_span

    def compress_span(rt, req, state, span, whole=True):
        spans.append((span.start, span.slots, span.end, span.m))
        return real(rt, req, state, span, whole)

    monkeypatch.setattr(due, "compress_span", compress_span)
    world = World(CONFIG, slots=POOL, scale=1, longest=2000, rows=2)
    with world.running():
        assert world.rt is not None
        world.rt.limits.border = MessageBorder(BORDER, 0)
        one, history = Server(world), array("q")
        for prompt, reply in said:
            history.extend(prompt)
            req = one.admit(list(history), len(reply))
            assert world.prefill(req)
            world.prefilled(req)
            world.finish(req, array("q", reply))
            held.append(req.keepkv.slots_held)
            history.extend(reply)
        world.check()
    return spans, held


def in_the_evaluator(said, probe) -> tuple[list[Span], list[int]]:
    row, held = ConversationRow(probe.row(), replace(CONFIG), MessageBorder(BORDER, 0)), []
    for prompt, reply in said:
        row.prompt(prompt)
        row.reply(reply)
        held.append(row.row.slots)
    return [(span.start, span.slots, span.end, span.m) for span in row.spans], held


def test_server_simulator_and_evaluator_compress_alike(server, record, model_path, monkeypatch):
    said, spans, held = turns_on_the_server(server, record)
    assert len(spans) == 6, "four prompts but the short one, and the long reply at two intervals, and the last at one"
    assert in_the_simulator(said, monkeypatch) == (spans, held)
    assert in_the_evaluator(said, Probe(str(model_path))) == (spans, held)
