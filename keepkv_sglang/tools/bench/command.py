"""The `keepkv bench` subcommand: options, and the course of a benchmark.

What runs is imported where it is used: `--help` takes no seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepkv_sglang.settings.values import budget_from_text
from keepkv_sglang.tools.agent_load import AgentLoad
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import origin
from keepkv_sglang.tools.simulate.command import pool_size

if TYPE_CHECKING:
    from .workloads import Workload

WORKLOADS = ("synthetic", "traces", "decode", "short", "serving")
POOL = {"synthetic": 3000, "traces": 8000, "decode": 8000, "short": 40_000, "serving": 8000}
SIZES = {"decode": (24, 1500, 200), "serving": (24, 1500, 200), "short": (64, 40, 20)}  # requests, prompt, generated
FIELDS = ("agents", "turns", "system", "task", "tool_result", "reply", "requests", "prompt", "generate", "at_once")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=("agents",), help="the benchmark; there is one")
    add("--workload", choices=WORKLOADS, default="synthetic", help="synthetic: agents that feed replies back; traces: "
        "a trace at its arrival times; decode: many requests at once; short: prompts that are never compressed; "
        "serving: decode with SGLang's own bench_serving as client (default: synthetic)")  # fmt: skip
    add("--model", help="as `keepkv model` takes it, or a model hub's name (default: the demo model)")
    add("--pool", type=pool_size, action="append", metavar="N", help="KV slots: 3000, 40k; repeat. Default: 3000, "
        "decode and traces 8000, short 40000")  # fmt: skip
    add("--budget", default="0.1", help="of the server `keepkv` (default: 0.1)")
    add("--servers", metavar="A,B", help="which, in this order: stock, keepkv, originals, budget1, disabled "
        "(default: stock,keepkv; short: disabled,keepkv)")  # fmt: skip
    add("--host", type=float, metavar="R", help="also with originals in host memory, for R times the pool")
    add("--budget1", action="store_true", help="also ours at budget 1: what the attention kernel gives alone")
    add("--disabled", action="store_true", help="also our attention backend without --enable-keepkv")
    add("--repeat", type=int, default=1, metavar="N", help="runs of every server, the order turned round each time")
    add("--server-flags", default="", metavar="'--X Y'", help="for every server")
    add("--keepkv-flags", default="", metavar="'--X Y'", help="for servers with --enable-keepkv")
    add("--out", type=Path, default=Path("bench-agents"), help="folder of report.md, results.json and plots")
    add("--seed", type=int, default=0)
    agents = parser.add_argument_group("synthetic (sizes in tokens)").add_argument
    for name, default, text in (
        ("agents", 6, "agents at once"),
        ("turns", 4, "of each"),
        ("system", 300, "system prompt that all share"),
        ("task", 500, "first message of an agent"),
        ("tool-result", 150, "message of every later turn"),
        ("reply", 24, "generated in every turn"),
    ):
        agents(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    many = parser.add_argument_group("decode, short and serving").add_argument
    many("--requests", type=int, metavar="N", help="default: 24, short 64")
    many("--prompt", type=int, metavar="TOKENS", help="default: 1500, short 40")
    many("--generate", type=int, metavar="TOKENS", help="default: 200, short 20")
    many("--at-once", type=int, default=0, metavar="N", help="most requests in flight (default: 0, all)")
    replay = parser.add_argument_group("traces").add_argument
    replay("--trace", action="append", metavar="TRACE", help="file, folder or name in the data folder; repeat "
           "(default: agent_traces)")  # fmt: skip
    replay("--scale", type=int, default=64, metavar="T", help="T tokens of the trace are one token (default: 64)")
    replay("--limit", type=int, default=40, metavar="N", help="only the first so many requests (default: 40)")
    replay("--speed", type=float, default=60.0, metavar="X", help="trace seconds per second (default: 60)")
    replay("--max-reply", type=int, default=64, metavar="N", help="tokens generated at most (default: 64)")
    replay("--data", type=Path, metavar="DIR", help="data folder (default: $KEEPKV_DATA, else ../shared/data)")


def server_names(args: argparse.Namespace) -> list[str]:
    """Which servers, in order. ValueError for an unknown or repeated one."""
    from .servers import NAMES

    default = "disabled,keepkv" if args.workload == "short" else "stock,keepkv"
    names = [name.strip() for name in (args.servers or default).split(",")]
    extra = {"originals": args.host, "budget1": args.budget1, "disabled": args.disabled}
    names += [name for name, wanted in extra.items() if wanted and name not in names]
    unknown = [name for name in names if name not in NAMES]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"--servers {args.servers}: name each of {', '.join(NAMES)} at most once")
    return names


def workload_of(args: argparse.Namespace) -> Workload:
    """The workload with the sizes asked for. ValueError for sizes that cannot be."""
    from .workloads import Agents, AllAtOnce, Replay

    if args.workload == "synthetic":
        sizes = {name: getattr(args, name) for name in FIELDS[:6]}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        return Agents(AgentLoad(**sizes, seed=args.seed))
    if args.workload == "traces":
        from keepkv_sglang.tools.simulate import traces

        if args.scale < 1 or args.speed <= 0 or args.max_reply < 1 or args.limit < 0:
            raise ValueError("--scale, --speed and --max-reply must be positive, --limit not negative")
        requests = traces.load(args.trace or ["agent_traces"], args.data, args.limit)
        return Replay(traces.tokenize(requests, args.scale), args.speed, max_reply=args.max_reply)
    count, prompt, new = SIZES[args.workload]
    count, prompt, new = args.requests or count, args.prompt or prompt, args.generate or new
    if min(count, prompt, new) < 1 or args.at_once < 0:
        raise ValueError("--requests, --prompt and --generate must be at least 1, --at-once not negative")
    return AllAtOnce(count, prompt, new, args.at_once, args.seed)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when a server with KeepKV failed a request. ValueError for options that cannot work."""
    from tqdm import tqdm

    from . import measure, report, servers, serving
    from .workloads import AllAtOnce

    names, pools = server_names(args), sorted(set(args.pool or [POOL[args.workload]]), reverse=True)
    if args.repeat < 1:
        raise ValueError(f"--repeat {args.repeat} must be at least 1")
    budget_from_text(args.budget)
    workload = workload_of(args)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a folder")
    path = models.resolve(args.model)
    check_context(path, workload)
    setup = servers.Setup(
        path,
        args.budget,
        tuple(shlex.split(args.server_flags)),
        tuple(shlex.split(args.keepkv_flags)),
        args.host or servers.Setup.host_ratio,
    )
    base = "stock" if "stock" in names else names[0]
    rows: list[dict[str, Any]] = []
    reference: dict[tuple[int, ...], list[int]] = {}
    about = [f"`{name}`: {servers.ABOUT[name]}" for name in names]
    source = origin(f"load {os.getloadavg()[0]:.1f} at the start")
    settings = {key: value for key, value in vars(args).items() if key != "run"} | {"origin": source}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    plan = [(r, pool, name) for pool in pools for r in range(args.repeat) for name in servers.order(names, r)]
    # The full cache in the largest pool comes first: its answers are what the others are compared with.
    full = next((name for name in ("stock", "disabled", "budget1") if name in names), None)
    plan.sort(key=lambda item: item != (0, pools[0], full))
    with tqdm(total=len(plan) * workload.total, unit=" requests", disable=None, file=sys.stderr) as bar:
        for repeat, pool, name in plan:
            bar.set_description(f"{name}, pool {pool:,}, run {repeat + 1}")
            with setup.start(name, pool) as server:
                servers.warm_up(server)
                row: dict[str, Any] = {"server": name, "pool": pool, "repeat": repeat}
                if args.workload == "serving":
                    assert isinstance(workload, AllAtOnce)
                    row |= serving.run(server, path, workload)
                    bar.update(workload.total)
                else:
                    calls, values = servers.run(server, workload, lambda: bar.update(1))
                    if not reference and name == full:
                        reference = {tuple(call.prompt): call.output for call in calls if call.ok}
                    row |= values | measure.agreement(calls, reference)
                    row["by_turn"] = measure.by_turn(calls)
                    row["first_errors"] = [call.error for call in calls if call.error][:3]
            rows.append(row)
            report.write(rows, args.out, settings, report.markdown(rows, source, about, base))
    text = report.markdown(rows, source, about, base)
    text += "".join(f"\n![{png.stem}]({png.name})\n" for png in report.plot(rows, args.out))
    report.write(rows, args.out, settings, text)
    print(text)
    # Stock refuses prompts that are longer than its pool: a result, not a failure of the benchmark.
    return 1 if any(row["errors"] for row in rows if row["server"] not in ("stock", "disabled")) else 0


def check_context(path: str, workload: Workload) -> None:
    """ValueError when the longest prompt with its reply is longer than the model's context."""
    config = Path(path) / "config.json"
    limit = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
    if limit and workload.longest > limit:
        raise ValueError(
            f"the workload's longest request has {workload.longest:,} tokens, the model's context {limit:,}; "
            "use smaller sizes, or a larger --scale for traces"
        )
