"""`keepkv version`."""

from __future__ import annotations

import argparse

from keepkv_sglang import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(_: argparse.Namespace) -> int:
    """Prints it."""
    print(__version__)
    return 0
