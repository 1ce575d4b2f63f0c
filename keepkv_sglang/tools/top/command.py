"""`keepkv top`: arguments and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import sys

from keepkv_sglang.tools import remote

UNREACHABLE, OFF = 1, 3
TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print once and exit: 1 no server there, 3 no KeepKV in it")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (default: 2)")
    remote.add_api_key(parser)


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, UNREACHABLE or OFF."""
    # Start-up cost: every `keepkv` command makes the parser of this one.
    from rich.console import Console

    from keepkv_sglang.tools.top import live, reading, screen  # the same

    if args.every <= 0:
        raise ValueError("--every must be above 0")
    console = Console(highlight=False)
    try:
        server = remote.Remote(args.url, args.api_key, TIMEOUT_S)
        first = reading.read(server)
    except (remote.UnreachableError, remote.OffError) as error:
        print(f"keepkv top: {error}", file=sys.stderr)
        return OFF if isinstance(error, remote.OffError) else UNREACHABLE
    if args.once or not console.is_terminal or console.is_dumb_terminal:
        console.print(screen.view(first))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            live.watch(server, first, args.every, console)
    return 0
