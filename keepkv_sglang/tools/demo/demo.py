"""`keepkv demo`: an agent's conversation on a real server, each turn with full cache and under a budget.

One server with --enable-keepkv serves both runs: ``custom_params {"keepkv": {"enabled": false}}`` makes a
request an ordinary SGLang request. Each run has its own cache_salt, so neither finds the other's prefix;
within a run every turn reuses the previous ones. The tool results are written down in conversation.py
and come back as user turns: a model of 135 million parameters cannot be trusted to call tools
(examples/agent_openai.py lets it try).

The client is imported where it is used: start-up cost.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.demo.conversation import SYSTEM, TURNS
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.server_process import ServerError, ServerProcess

POOL_SLOTS = 8000
ROW = "{:>5}  {:<11} {:>8} {:>6} {:>8} {:>12} {:>8}"
HEADER = ROW.format("turn", "cache", "logical", "held", "cached", "(compressed)", "seconds")


@dataclass
class Run:
    """One of the two conversations: its own history, since the replies differ."""

    name: str
    keepkv: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=lambda: [{"role": "system", "content": SYSTEM}])
    logical: int = 0
    held: int = 0
    seconds: float = 0.0


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
    flags += ["--enable-keepkv", "--keepkv-budget", str(budget)]
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
    full = Run("full", {"enabled": False})
    small = Run(f"KeepKV {label}"[:11], {"budget": budget})
    print(f"\n{HEADER}\n{'-' * len(HEADER)}")
    for turn, text in enumerate(TURNS[:turns], start=1):
        for conversation in (full, small):
            _say(f"turn {turn} of {turns}, {conversation.name}")
            print(_one_turn(client, conversation, turn, text, max_tokens), flush=True)
    print(_summary(full, small, turns))


def _one_turn(client: Any, conversation: Run, turn: int, text: str, max_tokens: int) -> str:
    """Sends one user turn and returns what to print: a row of numbers and the reply."""
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
    seconds = time.monotonic() - start
    reply = answer.choices[0].message.content or ""
    conversation.messages.append({"role": "assistant", "content": reply})
    info = answer.choices[0].meta_info["keepkv"]
    details = answer.usage.prompt_tokens_details
    conversation.logical, conversation.held = info["logical_tokens"], info["slots_held"]
    conversation.seconds += seconds
    row = ROW.format(
        turn,
        conversation.name,
        info["logical_tokens"],
        info["slots_held"],
        details.cached_tokens if details else 0,
        f"({info['cached_compressed_tokens']})",
        f"{seconds:.1f}",
    )
    short = textwrap.shorten(" ".join(reply.split()), 190, placeholder=" ...") or "(nothing)"
    return row + "\n" + textwrap.fill(short, 100, initial_indent=" " * 7, subsequent_indent=" " * 7)


def _summary(full: Run, small: Run, turns: int) -> str:
    share = 100 * small.held / max(full.held, 1)
    return f"""{"-" * len(HEADER)}
KV slots held after turn {turns}: {full.held} with full cache, {small.held} with KeepKV ({share:.0f} %).
The system prompt stays whole, so that other conversations share it.
Seconds in all: {full.seconds:.1f} with full cache, {small.seconds:.1f} with KeepKV.

logical     tokens of the conversation
held        KV slots they take
cached      prompt tokens that were not computed again
compressed  those of them that earlier turns merged
"""


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(f"keepkv demo: {line}", file=sys.stderr, flush=True)
