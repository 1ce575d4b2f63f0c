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
# Also for the servers that tests start. `make test` runs two pytests on two cores: OpenMP threads that spin while they
# wait for each other keep the other one from working. Read when torch is loaded, so it is set here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
FORKED = str(REPO / "tests" / "support" / "forked")
# Servers start in half the time (tests/support/forked/sitecustomize.py).
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FORKED, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def model_path() -> Path:
    """Folder of the demo model, made by `keepkv model` (half a minute the first time)."""
    command = [sys.executable, "-m", "keepkv_sglang.cli", "model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])
