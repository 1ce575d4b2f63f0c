"""The `keepkv` command. Each subcommand is one row of COMMANDS; its module is imported where it is used:
`keepkv --help` takes no seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepkv_sglang.tools.server_process import ServerError


@dataclass(frozen=True)
class Command:
    """A subcommand: `add_arguments` fills its parser, `run` returns the exit code.

    A ValueError from `run` is the user's to mend: it is printed as one line and exits 1.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="keepkv", description="KeepKV for SGLang.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, ServerError) as error:
        print(f"keepkv {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    where = "folder of converted models (default: models/ in $KEEPKV_CACHE or ~/.cache/keepkv)"
    parser.add_argument("name", nargs="?", help="a name of --list (default: the first), a folder or a GGUF file")
    parser.add_argument("--list", action="store_true", help="show the models: size, licence, time to make")
    parser.add_argument("--cache-dir", type=Path, help=where)
    parser.add_argument("--force", action="store_true", help="convert again even when the folder is good")


def _model(args: argparse.Namespace) -> int:
    from keepkv_sglang.tools.models import cache  # start-up cost: each command loads its own

    if args.list:
        print(cache.listing(args.cache_dir))
        return 0
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars make unreadable logs; our own lines stay
    print(cache.prepare(args.name, args.cache_dir, args.force))
    return 0


def _check(_: argparse.Namespace) -> int:
    from keepkv_sglang.tools import check

    return check.run()


def _version(_: argparse.Namespace) -> int:
    from keepkv_sglang import __version__

    print(__version__)
    return 0


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    from keepkv_sglang.tools.demo import demo

    demo.add_arguments(parser)


def _demo(args: argparse.Namespace) -> int:
    from keepkv_sglang.tools.demo import demo

    return demo.run(args)


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    from keepkv_sglang.tools.simulate import command

    command.add_arguments(parser)


def _simulate(args: argparse.Namespace) -> int:
    from keepkv_sglang.tools.simulate import command

    return command.run(args)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    from keepkv_sglang.tools.evaluate import command

    command.add_arguments(parser)


def _eval(args: argparse.Namespace) -> int:
    from keepkv_sglang.tools.evaluate import command

    return command.run(args)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from keepkv_sglang.tools.bench import command

    command.add_arguments(parser)


def _bench(args: argparse.Namespace) -> int:
    from keepkv_sglang.tools.bench import command

    return command.run(args)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    from keepkv_sglang.tools.inspect import command

    command.add_arguments(parser)


def _inspect(args: argparse.Namespace) -> int:
    from keepkv_sglang.tools.inspect import command

    return command.run(args)


COMMANDS = [
    Command("model", "Make a model ready; the last line printed is its folder.", _model, _model_arguments),
    Command("check", "Print versions, platform and SGLang seams; exit 1 when one does not match.", _check),
    Command("demo", "An agent on a real server, KeepKV beside full cache.", _demo, _demo_arguments),
    Command(
        "simulate", "Replay request traces through the prefix caches, without a model.", _simulate, _simulate_arguments
    ),
    Command("eval", "Quality of compression methods on real text, offline.", _eval, _eval_arguments),
    Command("bench", "Agents over HTTP: stock SGLang beside KeepKV, in little memory.", _bench, _bench_arguments),
    Command("inspect", "One request as a page: which tokens kept a slot.", _inspect, _inspect_arguments),
    Command("version", "Print the version of keepkv-sglang.", _version),
]

if __name__ == "__main__":
    sys.exit(main())
