"""Runs test_*_triton.py in Triton's interpreter: one process of its own, since the variable must be set before
@triton.jit runs, and a process that interprets kernels cannot compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from keepkv_sglang.tools.places import REPO

FOLDER = Path(__file__).parent


def test_every_triton_kernel_in_the_interpreter():
    modules = sorted(str(path) for path in FOLDER.glob("test_*_triton.py"))
    assert modules, f"no test_*_triton.py in {FOLDER}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
