"""The `keepkv verify` subcommand: arguments, course, table, exit code."""

from __future__ import annotations

import argparse
import sys
import time

from keepkv_sglang.settings.values import budget_from_text
from keepkv_sglang.tools.remote import OffError, Remote, UnreachableError, add_api_key
from keepkv_sglang.tools.verify.checks import FAILED, OK, SHOWN, SKIPPED, Checks, Row
from keepkv_sglang.tools.verify.server import Server
from keepkv_sglang.tools.verify.talk import Talk

UNREACHABLE = 2
TOLERANCES = {"float32": 1e-3}
OTHER_TOLERANCE = 0.2
"""Of 16-bit models. In bfloat16 on a CPU 0.015 was seen (docs/log.md, 2026-11-27); a GPU's kernels sum in orders of
their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the subcommand's parser."""
    add = parser.add_argument
    add("url", metavar="URL", help="of a running server with KeepKV, such as http://127.0.0.1:30000")
    add("--budget", default="0.2", help="of the compressed ways (default: 0.2)")
    add("--flush", action="store_true", help="ask for the cold ways a second time behind /flush_cache, which empties"
        " the prefix cache for everybody; without it in a namespace that nobody has used")  # fmt: skip
    add("--tolerance", type=float, metavar="NATS", help="most difference in log-probability of ways that must"
        f" agree (default: {TOLERANCES['float32']} for float32, else {OTHER_TOLERANCE})")  # fmt: skip
    add_api_key(parser)
    add("--timeout", type=float, default=600, metavar="SECONDS", help="for one answer (default: 600)")


def run(args: argparse.Namespace) -> int:
    """0 when all that could be checked is well, 1 when something is not, 2 when no server with KeepKV answers."""
    try:
        with Remote(args.url, args.api_key, args.timeout) as remote:
            return _verify(Server(remote), args)
    except (UnreachableError, OffError) as error:
        print(f"keepkv verify: {error}", file=sys.stderr)
        return UNREACHABLE


def _verify(server: Server, args: argparse.Namespace) -> int:
    budget = budget_from_text(args.budget)
    if budget == 1:
        raise ValueError("budget 1 compresses nothing; give a smaller --budget")
    dtype = str(server.info.get("dtype"))
    tolerance = TOLERANCES.get(dtype, OTHER_TOLERANCE) if args.tolerance is None else args.tolerance
    began, talk = time.monotonic(), Talk(server)
    print(f"{server.info.get('model_path')}, {dtype}, {server.keepkv['total_slots']:,} KV slots")
    print(f"a prompt of {len(talk.prompt)} tokens and a next turn of {len(talk.next)}, budget {budget}, greedy")
    print(f"in namespaces keepkv-verify-{talk.run}-* of the prefix cache; "
          + ("the cache is flushed twice, for everybody" if args.flush else "nothing is flushed"))  # fmt: skip
    print(f"\n{'':8} {'way':36} {'against':10} {'tokens':>6} {'parts at':>8} {'mean':>9} {'worst':>9}")
    _ = talk.full  # what all others are compared with: where the server refuses it, that is the answer
    rows = []
    for row in Checks(talk, budget, tolerance, args.flush).rows():
        rows.append(row)
        print(_line(row), flush=True)
    good, bad, left = (sum(row.verdict == verdict for row in rows) for verdict in (OK, FAILED, SKIPPED))
    seconds = time.monotonic() - began
    print(f"\n{'not well' if bad else 'well'}: {good} ok, {bad} failed, {left} skipped, after {seconds:.0f} s")
    return 1 if bad else 0


def _line(row: Row) -> str:
    found = row.difference
    numbers = " " * 36
    if found is not None:
        parted = "-" if found.parted is None else str(found.parted)
        numbers = f" {found.tokens:6} {parted:>8} {found.mean:9.6f} {found.worst:9.6f}"
    verdict = "" if row.verdict == SHOWN else row.verdict
    return f"{verdict:8} {row.what:36} {row.against:10}{numbers}  {row.note}"
