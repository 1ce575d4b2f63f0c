"""`keepkv demo`: an agent's conversation on a real server, each turn with full cache and under a budget.

One server with --enable-keepkv serves both runs: ``custom_params {"keepkv": {"enabled": false}}`` makes a
request an ordinary SGLang request. Each run has its own cache_salt, so neither finds the other's prefix;
within a run every turn reuses the previous ones, read over their originals in host memory (docs/originals.md). A third
run shows what the last question finds without them. The tool results are written down in conversation.py
and come back as user turns: a model of 135 million parameters cannot be trusted to call tools
(examples/agent_openai.py lets it try).

The client is imported where it is used: start-up cost.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.demo.conversation import ANSWER, ASKED_FROM, QUESTION, SYSTEM, TURNS
from keepkv_sglang.tools.demo.side_by_side import GAP, WIDTH, columns, common_words, parting
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.server_process import ServerError, ServerProcess

POOL_SLOTS = 8000


@dataclass
class Run:
    """One of the two conversations: its own history, since the replies differ."""

    name: str
    keepkv: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=lambda: [{"role": "system", "content": SYSTEM}])
    replies: list[str] = field(default_factory=list)
    logical: int = 0
    held: int = 0
    cached: int = 0
    unpacked: int = 0
    seconds: float = 0.0
    took: float = 0.0  # the last turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `keepkv demo`."""
    parser.add_argument(
        "--model", help="as `keepkv model` takes it, or a model hub's name (default: made when missing)"
    )
    parser.add_argument("--budget", default=0.2, help="KeepKV budget (default: 0.2)")
    parser.add_argument("--turns", type=int, default=len(TURNS), help=f"1 to {len(TURNS)} (default: all)")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of each reply (default: 48)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and prints it. Returns the exit code; raises ValueError for bad arguments."""
    budget = KeepKVConfig(budget=args.budget).budget
    if not 1 <= args.turns <= len(TURNS) or args.max_tokens < 1:
        raise ValueError(f"use --turns from 1 to {len(TURNS)} and --max-tokens of at least 1")
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: the server is stopped on the way out
        signal.signal(number, _interrupt)
    start = time.monotonic()
    os.environ.setdefault("TQDM_DISABLE", "1")  # as `keepkv model` does: progress bars make unreadable logs
    model_path = models.resolve(args.model)
    flags = ["--model-path", str(model_path), "--max-total-tokens", str(POOL_SLOTS), "--enable-cache-report"]
    flags += ["--enable-keepkv", "--keepkv-budget", str(budget), "--keepkv-host-ratio", "1"]
    _say("starting the server: sglang.launch_server " + " ".join(flags))
    try:
        with ServerProcess(flags, say=_say) as server:
            _say(f"the server is ready after {server.seconds_to_start:.0f} s, log: {server.log_path}")
            _converse(server.base_url, budget, args.turns, args.max_tokens)
            _say("stopping the server")
    except ServerError as error:
        print(f"keepkv demo: {error}", file=sys.stderr)
        return 1
    _say(f"done, {time.monotonic() - start:.0f} s in all")
    return 0


def _converse(base_url: str, budget: float | int, turns: int, max_tokens: int) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=600, max_retries=0)
    label = f"{100 * budget:g} %" if budget <= 1 else f"{budget} slots"
    full, small = Run("full cache", {"enabled": False}), Run(f"KeepKV, budget {label}", {"budget": budget})
    print(f"\n{_pair(full.name, small.name)}")
    for turn, text in enumerate(TURNS[:turns], start=1):
        print(f"\n{RULE}\nturn {turn}: {text.splitlines()[0]}\n", flush=True)
        for conversation in (full, small):
            _say(f"turn {turn} of {turns}, {conversation.name}")
            _one_turn(client, conversation, text, max_tokens)
        print(columns(full.replies[-1], small.replies[-1]))
        print(f"\n{_pair(_numbers(full), _numbers(small))}\n{parting(full.replies[-1], small.replies[-1])}", flush=True)
    if turns >= ASKED_FROM:
        _long_gone(client, full, small)
    print(_summary(full, small, turns))


def _long_gone(client: Any, full: Run, small: Run) -> None:
    """One question about the second turn: with the full cache, with originals, and without them."""
    without = Run("the same without originals", {**small.keepkv, "unpack": False}, messages=small.messages[:1])
    said = small.messages[1:]
    _say(f"the same conversation as {small.name}, {without.name}")
    for text, reply in zip(said[::2], said[1::2], strict=True):
        _one_turn(client, without, text["content"], max_tokens=1)
        without.messages[-1] = reply
    print(f"\n{RULE}\nasked for something long gone: {QUESTION}\n")
    for run in (full, small, without):
        _say(f"the last question, {run.name}")
        _one_turn(client, run, QUESTION, max_tokens=24)
        found = re.search(rf"\b{ANSWER}\b", run.replies[-1]) is not None
        print(f"{'found' if found else 'not found':>9}  {run.name}: {' '.join(run.replies[-1].split())}", flush=True)


def _one_turn(client: Any, conversation: Run, text: str, max_tokens: int) -> None:
    """Sends one user turn; the reply and its numbers go into `conversation`."""
    conversation.messages.append({"role": "user", "content": text})
    start = time.monotonic()
    answer = client.chat.completions.create(
        model="default",
        messages=conversation.messages,
        temperature=0,
        max_tokens=max_tokens,
        extra_body={
            "custom_params": {"keepkv": conversation.keepkv},
            "cache_salt": conversation.name,
            "return_meta_info": True,
        },
    )
    conversation.took = time.monotonic() - start
    conversation.seconds += conversation.took
    reply = answer.choices[0].message.content or ""
    conversation.messages.append({"role": "assistant", "content": reply})
    conversation.replies.append(reply)
    info = answer.choices[0].meta_info["keepkv"]
    details = answer.usage.prompt_tokens_details
    conversation.logical, conversation.held = info["logical_tokens"], info["slots_held"]
    conversation.cached = details.cached_tokens if details else 0
    conversation.unpacked = info["unpacked_tokens"]


RULE = "-" * (2 * WIDTH + len(GAP))


def _pair(left: str, right: str) -> str:
    return f"{left:{WIDTH}}{GAP}{right}"


def _numbers(run: Run) -> str:
    cached = f"{run.cached:,} cached" + (f", {run.unpacked:,} of them unpacked" if run.unpacked else "")
    return f"{run.logical:,} tokens in {run.held:,} slots; {cached}; {run.took:.1f} s"


def _summary(full: Run, small: Run, turns: int) -> str:
    pairs = list(zip(full.replies[:turns], small.replies[:turns], strict=True))
    same = sum(common_words(a, b) is None for a, b in pairs)
    share = 100 * small.held / max(full.held, 1)
    saved = f"{small.held:,} slots instead of {full.held:,} ({share:.0f} %)"
    agree = f"{same} of {len(pairs)} answers are the same, word for word"
    return f"""
{RULE}
{saved}; {agree}; {small.seconds:.0f} s instead of {full.seconds:.0f} s.

Each conversation goes on from its own answers, so one that differs changes what follows. The system prompt stays
whole, so that other conversations share it.
tokens: of the conversation. slots: of the KV pool, that hold them. cached: tokens of the prompt that were not computed
again; unpacked: those that were read as originals from host memory.
"""


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(f"keepkv demo: {line}", file=sys.stderr, flush=True)
