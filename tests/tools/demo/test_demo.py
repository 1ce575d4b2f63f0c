"""What `keepkv demo` is there to show, on a real server: a question that only the originals still answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.server
@pytest.mark.soak
def test_only_the_originals_find_what_is_long_gone(model_path: Path):
    command = [sys.executable, "-m", "keepkv_sglang.cli", "demo", "--model", str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line for line in done.stdout.splitlines() if line.strip().startswith(("found ", "not found "))]
    assert [line.lstrip().startswith("found") for line in found] == [True, True, False], found
