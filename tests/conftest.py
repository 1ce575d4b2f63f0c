"""Fixtures that many tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# The same git-ignored cache as the Makefile, so that pytest on its own converts nothing twice.
os.environ.setdefault("KEEPKV_CACHE", str(REPO / ".cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest -n 2 --dist loadgroup (make test): one worker has all tests with a live server, first, since they take
    longest and two servers at once would starve each other; the other worker has everything else."""
    items.sort(key=lambda item: item.get_closest_marker("server") is None)  # stable
    for item in items:
        if item.get_closest_marker("server") is not None:
            item.add_marker(pytest.mark.xdist_group("server"))


@pytest.fixture(scope="session")
def model_path() -> Path:
    """Folder of the demo model, made by `keepkv model` (half a minute the first time)."""
    command = [sys.executable, "-m", "keepkv_sglang.cli", "model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])
