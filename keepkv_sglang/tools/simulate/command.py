"""The `keepkv simulate` subcommand: arguments, runs, output.

What runs is imported where it is used: `--help` takes no seconds.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keepkv_sglang.settings.config import PRESSURE_MODES, KeepKVConfig
from keepkv_sglang.settings.values import budget_from_text


def pool_size(text: str) -> int:
    """A number of KV slots: 400000, 400k or 1.5M."""
    factor = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    try:
        size = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        size = 0
    if not 1 <= size < 1 << 40:
        raise argparse.ArgumentTypeError(f"pool {text!r} is not a number of KV slots; use 400000, 400k or 1.5M")
    return int(size)


def _budget(text: str) -> float | int:
    try:
        return budget_from_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("traces", nargs="+", metavar="TRACE", help="file or folder, or a name in the data folder: agent_traces, "
        "mooncake/conversation_trace.jsonl; all are replayed together, each from time 0")  # fmt: skip
    add("--pool", type=pool_size, action="append", default=[], metavar="N", help="KV slots: 400000, 400k, 1.5M; repeat")
    add("--half-ideal", action="store_true", help="also find the pool at which stock gets half of its ideal hit rate, "
        "and compare KeepKV there with its ceiling")  # fmt: skip
    add("--ceiling", action="store_true", help="also replay with a pool that never runs out")
    add("--budget", type=_budget, action="append", metavar="B", help="KeepKV's budget; repeat (default: 0.1)")
    add("--policy", choices=("stock", "keepkv", "both"), default="both", help="default: both")
    add("--span-tokens", type=int, action="append", metavar="S",
        help="length of cache entries, 0: whole turns; repeat (default: 0)")  # fmt: skip
    add("--pressure", choices=PRESSURE_MODES, default="off", help="what happens to cold uncompressed prefixes when "
        "slots run low (default: merge)")  # fmt: skip
    add("--host-ratio", type=float, default=0.0, metavar="R", help="originals in host memory for R times the pool's "
        "tokens (default: 0, none)")  # fmt: skip
    add("--scale", type=int, default=16, metavar="T", help="T real tokens are simulated as one (default: 16)")
    add("--limit", type=int, default=0, metavar="REQUESTS", help="only the first so many requests")
    add("--max-running", type=int, default=256, metavar="N", help="most requests that run at once (default: 256)")
    add("--arena-rows", type=int, default=0, metavar="N",
        help="query vectors that the arena holds (default: 0, no limit in bytes)")  # fmt: skip
    add("--prefill-rate", type=_positive, default=20_000.0, metavar="TOKENS",
        help="uncached prompt tokens per second, where the trace has no times (default: 20000)")  # fmt: skip
    add("--seconds-per-token", type=_positive, default=0.03, metavar="SECONDS",
        help="per reply token, where the trace has no times (default: 0.03)")  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="data folder (default: $KEEPKV_DATA, else ../shared/data)")
    add("--json", type=Path, metavar="OUT", help="write all numbers here")
    add("--plot", type=Path, metavar="OUT.png", help="plot hit rate over pool size (needs matplotlib)")


def _configs(args: argparse.Namespace) -> list[KeepKVConfig | None]:
    configs: list[KeepKVConfig | None] = [None] if args.policy != "keepkv" else []
    if args.policy == "stock":
        return configs
    for span_tokens in args.span_tokens or [0]:
        configs += [
            KeepKVConfig(
                enabled=True,
                budget=budget,
                span_tokens=span_tokens,
                pressure=args.pressure,
                host_ratio=args.host_ratio,
                unpack=1.0,
            )
            for budget in args.budget or [0.1]
        ]
    return configs


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import report, search, traces
    from .replay import Result, Timing, replay

    if not (args.pool or args.half_ideal or args.ceiling):
        raise ValueError("nothing to replay; give --pool N, --ceiling or --half-ideal")
    if args.half_ideal and args.policy != "both":
        raise ValueError("--half-ideal compares both policies; leave out --policy")
    if args.plot is not None:
        report.require_matplotlib()  # before minutes of work
    logging.getLogger("sglang").setLevel(logging.WARNING)
    configs = _configs(args)
    work = traces.tokenize(traces.load(args.traces, args.data, args.limit), args.scale)
    timing = Timing(args.prefill_rate, args.seconds_per_token)
    results: list[Result] = []
    claims: list[search.Claim] = []
    with tqdm(total=0, unit=" requests", disable=None, file=sys.stderr) as bar:
        options: dict[str, Any] = dict(
            timing=timing, max_running=args.max_running, arena_rows=args.arena_rows, tick=bar.update
        )

        def planned(what: str, replays: int = 1) -> None:
            bar.set_description(what)
            bar.total += replays * len(work.requests)

        for config in configs:
            name = "stock" if config is None else f"budget {config.budget}"
            for pool in sorted(args.pool):
                planned(f"{name}, pool {pool:,}")
                results.append(replay(work, pool, config, **options))
            if args.ceiling:
                planned(f"{name}, ceiling")
                results.append(search.ceiling(work, config, **options))
        if args.half_ideal:
            compressing = [config for config in configs if config is not None]
            planned("half ideal", 2 * len(compressing) + 10)
            claims = search.examine(work, compressing, **options)
    print(f"{len(work.requests):,} requests, {sum(len(p) for p in work.prompts) * args.scale:,} prompt tokens, "
          f"scale {args.scale}")  # fmt: skip
    if results:
        print(report.table(results))
    for claim in claims:
        print(claim.line())
    if claims:
        print(report.table([claims[0].stock, *(claim.keepkv for claim in claims)]))
    if args.json is not None:
        names = ("traces", "limit", "scale", "pressure", "max_running", "arena_rows", "host_ratio")
        settings = {name: getattr(args, name) for name in names}
        report.write_json(args.json, results, claims, settings | asdict(timing))
    if args.plot is not None:
        shown = [*results, claims[0].stock, *(claim.keepkv for claim in claims)] if claims else results
        report.plot(args.plot, shown, ", ".join(args.traces))
    return 0
