"""`keepkv model`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `keepkv model`."""
    where = "folder of converted models (default: models/ in $KEEPKV_CACHE or ~/.cache/keepkv)"
    parser.add_argument("name", nargs="?", help="a name of --list (default: the first), a folder or a GGUF file")
    parser.add_argument("--list", action="store_true", help="show the models: size, licence, time to make")
    parser.add_argument("--cache-dir", type=Path, help=where)
    parser.add_argument("--force", action="store_true", help="convert again even when the folder is good")


def run(args: argparse.Namespace) -> int:
    """Makes the model, or lists them."""
    from keepkv_sglang.tools.models import cache  # start-up cost: numpy, and what reads a tokenizer

    if args.list:
        print(cache.listing(args.cache_dir))
        return 0
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars make unreadable logs; our own lines stay
    print(cache.prepare(args.name, args.cache_dir, args.force))
    return 0
