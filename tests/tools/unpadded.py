"""Rows of Markdown tables without the spaces that fill up their columns."""

from __future__ import annotations

import re


def unpadded(text: str) -> str:
    """The text with every run of spaces as one space."""
    return re.sub(" +", " ", text)
