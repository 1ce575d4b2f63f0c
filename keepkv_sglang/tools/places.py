"""Folders: the checkout, what is kept between runs, and the texts and traces of the measurements."""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """$KEEPKV_CACHE, or ~/.cache/keepkv. `make` sets it to .cache of the checkout."""
    return Path(os.environ.get("KEEPKV_CACHE") or "~/.cache/keepkv").expanduser().absolute()


def data_folder(given: Path | None = None, holds: str = "") -> Path:
    """The first of `given`, $KEEPKV_DATA and ../shared/data beside the checkout that exists and has a file or folder
    `holds`. ValueError where none has."""
    for folder in (given, os.environ.get("KEEPKV_DATA"), REPO.parent / "shared" / "data"):
        if folder and (Path(folder) / holds).exists():
            return Path(folder)
    raise ValueError(f"no data folder with {holds or 'files'}: name one with --data or KEEPKV_DATA")
