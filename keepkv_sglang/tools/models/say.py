"""What `keepkv model` says while it works, and how it fails."""

from __future__ import annotations

import sys


class ModelError(ValueError):
    """The model cannot be made; the message says in one line what to do."""


def say(line: str) -> None:
    """One line of progress on stderr."""
    print(f"keepkv model: {line}", file=sys.stderr, flush=True)


def gigabytes(count: int) -> str:
    """Such as "1.12 GB"."""
    return f"{count / 1e9:.2f} GB"
