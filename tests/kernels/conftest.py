"""Triton tests (test_*_triton.py) need a process of their own: Triton reads TRITON_INTERPRET when @triton.jit runs.

test_triton_interpreter.py starts that process. To work on one file: TRITON_INTERPRET=1 pytest tests/kernels/test_x_triton.py.
On a machine with a CUDA device they are collected as well without the variable, and run compiled.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # paged.py, under --import-mode=importlib
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*_triton.py"]
