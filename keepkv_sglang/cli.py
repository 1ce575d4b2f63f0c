"""The `keepkv` command. Each subcommand is one row of COMMANDS and a module of tools/ that keeps its start-up cost to
itself: `keepkv --help` takes no seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from keepkv_sglang.tools.server_process import ServerError


@dataclass(frozen=True)
class Command:
    """A subcommand. `module`, in tools/, has add_arguments(parser) and run(args), which returns the exit code.

    A ValueError from `run` is the user's to mend: it is printed as one line and exits 1.
    """

    name: str
    help: str
    module: str

    @property
    def loaded(self) -> Any:
        return import_module(f"keepkv_sglang.tools.{self.module}")


COMMANDS = [
    Command("model", "Make a model ready; the last line printed is its folder.", "models.command"),
    Command("check", "Print versions, platform and SGLang seams; exit 1 when one does not match.", "check"),
    Command("demo", "An agent on a real server, KeepKV beside full cache.", "demo.demo"),
    Command("top", "Watch a running server: slots against tokens, hits, what was skipped.", "top.command"),
    Command("verify", "Ask a running server the same in several ways and compare.", "verify.command"),
    Command("inspect", "One request as a page: what each head kept, merged and dropped.", "inspect.command"),
    Command("tune", "What budgets buy and cost on a trace of yours, and which to take.", "tune.command"),
    Command("simulate", "Replay request traces through the prefix caches, without a model.", "simulate.command"),
    Command("eval", "Quality of compression methods on real text, offline.", "evaluate.command"),
    Command("bench", "Agents over HTTP: stock SGLang beside KeepKV, in little memory.", "bench.command"),
    Command("version", "Print the version of keepkv-sglang.", "version"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="keepkv", description="KeepKV for SGLang.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.loaded.add_arguments(sub)
        sub.set_defaults(run=command.loaded.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, ServerError) as error:
        print(f"keepkv {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
