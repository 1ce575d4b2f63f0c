"""Options and course of `keepkv eval`.

Tasks and torch are imported where they are used: `--help` takes no seconds.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.documents import HALVES
from keepkv_sglang.tools.evaluate.results import OFF, ORIGINALS
from keepkv_sglang.tools.models import cache as models
from keepkv_sglang.tools.origin import origin
from keepkv_sglang.tools.places import data_folder

TASKS = {
    "fidelity": "keepkv_sglang.tools.evaluate.fidelity:Fidelity",
    "parity": "keepkv_sglang.tools.evaluate.parity:Parity",  # needs kvpress: only with --peers, or when asked for
    "recall": "keepkv_sglang.tools.evaluate.recall:Recall",
    "recall_after": "keepkv_sglang.tools.evaluate.recall:RecallAfter",
    "needle": "keepkv_sglang.tools.evaluate.recall:Needle",
    "needle_after": "keepkv_sglang.tools.evaluate.recall:NeedleAfter",
    "ruler_after": "keepkv_sglang.tools.evaluate.ruler:RulerAfter",
    "instructions": "keepkv_sglang.tools.evaluate.instructions:Instructions",
    "instructions_after": "keepkv_sglang.tools.evaluate.instructions_after:InstructionsAfter",
    "leakage": "keepkv_sglang.tools.evaluate.leakage:Leakage",
    "turns": "keepkv_sglang.tools.evaluate.turns:Turns",
    "repeated": "keepkv_sglang.tools.evaluate.repeated:Repeated",
    "decoding": "keepkv_sglang.tools.evaluate.repeated:Decoding",
    "long": "keepkv_sglang.tools.evaluate.long_context:Long",
}
BUDGETS = (0.05, 0.1, 0.2, 0.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the subcommand's parser."""
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this one; may be repeated")
    parser.add_argument("--method", action="append", metavar="NAME", help="only methods whose name contains NAME")
    parser.add_argument("--budget", action="append", type=float, help=f"default {', '.join(map(str, BUDGETS))}")
    parser.add_argument("--half", choices=HALVES, default="held-out", help="documents for choosing, or for reporting")
    parser.add_argument("--items", type=int, default=0, help="items per task; default: the task's own number")
    parser.add_argument("--tokens", type=int, default=1536, help="context length")
    parser.add_argument(
        "--originals", action="append", choices=ORIGINALS, help="tasks turns and *_after: the K/V of"
        f" compressed tokens are kept so and read again before the next turn; may be repeated; default {OFF}",
    )  # fmt: skip
    parser.add_argument("--peers", action="store_true", help="kvpress beside ours (make kvpress installs it)")
    parser.add_argument("--model", help="as `keepkv model` takes it, or a model hub's name; default: the demo model")
    parser.add_argument("--data", type=Path, help="folder of texts; default: $KEEPKV_DATA or ../shared/data")
    parser.add_argument("--out", type=Path, default=Path("eval"), help="folder of results; a run goes on where it was")
    parser.add_argument("--device", default="cpu", help="where torch runs model and compression, in float32")
    parser.add_argument(
        "--part", type=_part, metavar="I/N", help="only item I (from 1) of every N, in a file of its own:"
        " N processes can share a run, and --report joins what they wrote"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--list", action="store_true", help="list tasks and methods")


def run(args: argparse.Namespace) -> int:
    """Exit code 0. ValueError for options that cannot work."""
    import torch

    from keepkv_sglang.tools.evaluate.probe import Probe
    from keepkv_sglang.tools.evaluate.results import Results
    from keepkv_sglang.tools.evaluate.task import Setup
    from keepkv_sglang.tools.evaluate.task import run as run_task

    methods = _methods(args.method, args.peers)
    if args.list:
        print("tasks: ", ", ".join(TASKS))
        print("methods:", *[f"  {method.name}" for method in methods], sep="\n")
        return 0
    budgets = args.budget or list(BUDGETS)
    if not all(0 < budget <= 1 for budget in budgets):
        raise ValueError("--budget takes fractions in (0, 1]")
    # parity needs the peers, long hours and another model than the demo's
    names = args.task or [name for name in TASKS if name != "long" and (args.peers or name != "parity")]
    path = models.resolve(args.model)
    # The fingerprint: results of other defaults must not pass for those of these.
    defaults = KeepKVConfig(enabled=True).fingerprint()
    description = {"model": Path(path).name, "tokens": args.tokens, "half": args.half, "defaults": defaults}
    if args.device != "cpu":
        description["device"] = args.device
    part = f"-{args.part[0]}of{args.part[1]}" if args.part else ""
    path_of_rows = args.out / f"{args.half}{part}.jsonl"
    results = Results(path_of_rows, description, sorted(set(args.out.glob(f"{args.half}*.jsonl")) - {path_of_rows}))
    if not args.report:
        torch.set_num_threads(args.threads)
        probe = Probe(path, args.device)
        data, originals = data_folder(args.data, "SOURCES.md"), args.originals or [OFF]
        setup = Setup(
            probe, data, args.half, args.items, args.tokens, methods, budgets, list(dict.fromkeys(originals)), args.part
        )  # fmt: skip
        for name in names:
            run_task(_task(name), setup, results)
    report = write_report(results, [_task(name) for name in names], args)
    print(report)
    return 0


def _part(text: str) -> tuple[int, int]:
    """ "2/6" -> (2, 6)."""
    index, slash, of = text.partition("/")
    if not (index.isdecimal() and slash and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} is no part of a run: give I/N with I from 1 to N, 2/6 say")
    return int(index), int(of)


def _task(name: str) -> Any:
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)()


def _methods(wanted: Sequence[str] | None, peers: bool) -> list[Any]:
    from keepkv_sglang.tools.evaluate.future import EXPECTED_ATTENTION_FULL
    from keepkv_sglang.tools.evaluate.methods import OURS

    known: list[Any] = [*OURS.values(), EXPECTED_ATTENTION_FULL]
    if peers:
        from keepkv_sglang.tools.evaluate.peers import peers as load_peers

        known += load_peers()
    chosen = [method for method in known if not wanted or any(part in method.name for part in wanted)]
    if not chosen:
        raise ValueError(f"no method is called like {', '.join(wanted or [])}; keepkv eval --list shows all")
    return chosen


def write_report(results: Any, tasks: Sequence[Any], args: argparse.Namespace) -> str:
    """Writes report.md, results.json and plots beside the results; returns the Markdown."""

    from keepkv_sglang.tools.report import plots

    folder = results.path.parent
    lines = [f"# keepkv eval, {args.half} half", "", origin(f"{args.threads} threads"), ""]
    for task in tasks:
        rows = results.of(task.name)
        if not rows:
            continue
        lines += [f"## {task.name}", "", (type(task).__doc__ or "").strip().splitlines()[0], "", task.report(rows), ""]
        if plots.available():
            made = task.plot(rows, folder)
            lines += [f"![{path.stem}]({path.name})" for path in made] + [""]
    text = "\n".join(lines)
    (folder / f"report-{args.half}.md").write_text(text)
    (folder / f"results-{args.half}.json").write_text(json.dumps(results.rows, indent=0))
    return text
