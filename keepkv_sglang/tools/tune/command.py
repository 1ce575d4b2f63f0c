"""The `keepkv tune` subcommand: arguments, course, table, recommendation, plot.

What runs is imported where it is used: `--help` takes no seconds.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.command import BUDGETS
from keepkv_sglang.tools.evaluate.results import OFF
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.report import plots, tables
from keepkv_sglang.tools.simulate.command import pool_size

# Start-up cost: every `keepkv` command makes the parser of this one. So numpy, torch and the simulator are imported
# where they are used, here and below.
if TYPE_CHECKING:
    from keepkv_sglang.tools.evaluate.turns import Item
    from keepkv_sglang.tools.simulate.traces import Workload
    from keepkv_sglang.tools.tune.buys import Bought
    from keepkv_sglang.tools.tune.costs import Cost

BLOCKS_SCALE = 16  # of block-hash traces, as `keepkv simulate` has it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the subcommand's parser."""
    add = parser.add_argument
    add("trace", metavar="TRACE", help="JSON lines with messages, or what `keepkv simulate` reads (no texts there:"
        " what budgets cost is then not known)")  # fmt: skip
    add("--model", help="that cuts and reads the texts, as `keepkv model` takes it, or a model hub's name; default:"
        " the demo model")  # fmt: skip
    add("--pool", type=pool_size, default=0, metavar="N", help="KV slots of your server, max_total_num_tokens in"
        " /server_info: 400000, 400k, 1.5M (default: a quarter of what the trace takes)")  # fmt: skip
    add("--budget", type=float, action="append", help=f"repeat (default: {', '.join(map(str, BUDGETS))})")
    add("--host-ratio", type=float, default=0.0, metavar="R", help="originals in host memory for R times the pool's"
        " tokens (default: 0, none)")  # fmt: skip
    add("--least-top1", type=float, default=0.9, metavar="SHARE", help="of the tokens in which a budget that is"
        " recommended agrees with the full cache (default: 0.9)")  # fmt: skip
    add("--minutes", type=float, default=5.0, help="that it may take, half of it for each part (default: 5)")
    add("--every", type=float, default=10.0, metavar="SECONDS", help="between conversations, and between the turns of"
        " one, where the trace has no times (default: 10)")  # fmt: skip
    add("--device", default="cpu", help="where torch runs the model, in float32 (default: cpu)")
    add("--data", type=Path, metavar="DIR", help="data folder of traces (default: $KEEPKV_DATA, else ../shared/data)")
    add("--plot", type=Path, default=Path("tune.png"), metavar="OUT.png", help="default: tune.png")


def run(args: argparse.Namespace) -> int:
    """Exit code 0. ValueError for what cannot work."""
    from keepkv_sglang.tools.tune import advice  # start-up cost

    budgets = sorted(set(args.budget or BUDGETS))
    if not all(0 < budget < 1 for budget in budgets):
        raise ValueError("--budget takes fractions below 1")
    if not args.minutes > 0:
        raise ValueError("--minutes takes a positive number")
    began = time.monotonic()
    logging.getLogger("sglang").setLevel(logging.WARNING)
    work, probe, items = _trace(args)
    seconds = 60 * args.minutes
    bought = _buys(args, work, budgets, seconds / 2)
    costs = _costs(args, probe, items, budgets, seconds - (time.monotonic() - began)) if items else {}
    _print(args, bought, len(work.requests), costs)
    choices = [
        advice.Choice(budget, result.hit_rate, costs[budget].top1.mean if costs else None)
        for budget, result in bought.keepkv.items()
    ]
    stock, ideal = bought.stock.hit_rate, bought.ideal.hit_rate
    print(f"\n{advice.advice(choices, stock, ideal, args.least_top1, originals=args.host_ratio > 0)}")
    if plots.available():
        print(f"\nplot: {_plot(args.plot, args.trace, choices, stock, ideal)}")
    else:
        print("\nno plot: it needs matplotlib (pip install matplotlib)")
    return 0


def _trace(args: argparse.Namespace) -> tuple[Workload, Any, list[Item]]:
    """The workload; the model, and the conversations where the trace has texts."""
    from keepkv_sglang.tools.simulate import traces  # start-up cost, as the next one
    from keepkv_sglang.tools.tune import messages

    path = Path(args.trace)
    if not (path.is_file() and messages.is_messages(path)):
        return traces.tokenize(traces.load([args.trace], args.data), BLOCKS_SCALE), None, []
    from keepkv_sglang.tools.evaluate.probe import Probe  # with texts only: a trace of blocks needs no model

    talks = messages.read(path)
    probe = Probe(str(models.resolve(args.model)), args.device)
    items = messages.items(probe, talks)
    return messages.workload(probe, talks, items, args.every), probe, items


def _buys(args: argparse.Namespace, work: Workload, budgets: list[float], seconds: float) -> Bought:
    from tqdm import tqdm  # start-up cost, as the next ones

    from keepkv_sglang.tools.simulate.replay import Timing
    from keepkv_sglang.tools.tune import buys

    configs = [KeepKVConfig(enabled=True, budget=b, host_ratio=args.host_ratio, unpack=1.0) for b in budgets]
    replays = len(configs) + 2
    chosen = buys.affordable(work, replays, seconds, configs[0])
    with tqdm(total=replays * len(chosen.requests), desc="simulated", unit=" requests", mininterval=2.0) as bar:
        return buys.measure(chosen, args.pool, configs, Timing(), bar.update)


def _costs(args: argparse.Namespace, probe: Any, items: list[Item], budgets: list[float], seconds: float) -> Any:
    from tqdm import tqdm  # start-up cost, as the next ones

    from keepkv_sglang.tools.tune import costs

    originals = "native" if args.host_ratio > 0 else OFF
    chosen = costs.sample(items)
    with tqdm(total=len(chosen), desc="evaluated", unit=" conversations", mininterval=2.0) as bar:
        return costs.measure(probe, chosen, budgets, originals, seconds, bar.update)


def _print(args: argparse.Namespace, bought: Bought, requests: int, costs: dict[float, Cost]) -> None:
    simulated = f"{requests:,}" if bought.requests == requests else f"the first {bought.requests:,} of {requests:,}"
    evaluated = next((cost.conversations for cost in costs.values()), 0)
    print(f"simulated: {simulated} requests, {bought.ideal.prompt_tokens:,} prompt tokens, a pool of {bought.pool:,}"
          f" KV slots; evaluated: {evaluated} conversations\n")  # fmt: skip
    columns = ("", "hit rate", "rejected", "waited", "peak slots", "slots per token", "KL [95 %]", "top-1 % [95 %]")
    rows = [_row("stock, any pool", bought.ideal, None), _row("stock", bought.stock, None)]
    rows += [_row(f"budget {budget:g}", result, costs.get(budget)) for budget, result in bought.keepkv.items()]
    print(tables.plain(columns, rows))
    if not costs:
        print(f"\nNo KL and no top-1: {args.trace} has no conversation of text, or none that is short enough.")


def _row(name: str, result: Any, cost: Cost | None) -> list[object]:
    simulated = [f"{result.hit_rate:.1%}", result.rejected, result.waited, f"{result.peak_slots:,}"]
    if cost is None:
        return [name, *simulated, "", "", ""]
    top1 = cost.top1
    percent = f"{100 * top1.mean:.1f} [{100 * top1.low:.1f}, {100 * top1.high:.1f}]"
    return [name, *simulated, f"{cost.held:.2f}", cost.kl.text(3), percent]


def _plot(path: Path, title: str, choices: list[Any], stock: float, ideal: float) -> Path:
    budgets = [choice.budget for choice in choices]
    lines = {
        "hit rate, KeepKV": {choice.budget: 100 * choice.hit_rate for choice in choices},
        "hit rate, stock SGLang": dict.fromkeys(budgets, 100 * stock),
        "hit rate, stock on any pool": dict.fromkeys(budgets, 100 * ideal),
    }
    agreement = {choice.budget: 100 * choice.top1 for choice in choices if choice.top1 is not None}
    if agreement:
        lines["top-1 agreement with the full cache"] = agreement
    return plots.curves(lines, path, "budget (slots kept of a turn's tokens)", "%", log=False, bottom=0, title=title)
