"""Which implementation of score, merge and codec computes on a tensor's device.

On a CPU C++ (cpu_build.py); on a GPU our Triton kernels, or with KEEPKV_GPU_KERNEL=torch torch. Under Triton's
interpreter (TRITON_INTERPRET=1) KEEPKV_GPU_KERNEL=triton counts on a CPU as well: so they are tested.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from keepkv_sglang.kernels import cpu_build

GPU_KERNELS = ("torch", "triton")


def gpu_kernel() -> str:
    """KEEPKV_GPU_KERNEL, "triton" by default. ValueError for an unknown name."""
    name = os.environ.get("KEEPKV_GPU_KERNEL") or "triton"
    if name not in GPU_KERNELS:
        raise ValueError(f"unknown GPU kernel {name!r}: choose {' or '.join(GPU_KERNELS)} (KEEPKV_GPU_KERNEL)")
    return name


def prepare(device: torch.device) -> None:
    """At start: a wrong name or a missing Triton is found now rather than while a request is compressed. ValueError,
    ImportError."""
    if gpu_kernel() == "triton" and device.type == "cuda":
        for op in ("score", "merge", "codec"):
            importlib.import_module(f"keepkv_sglang.kernels.{op}.triton_impl")


def interpreted() -> bool:
    """Whether Triton's interpreter stands for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("KEEPKV_GPU_KERNEL") == "triton"


def implementation(op: str, x: torch.Tensor) -> ModuleType | None:
    """The op's cpp_impl or triton_impl for tensors where x is, or None: torch computes it. A module need not have all
    functions of its op, and says in supports() which storage it reads."""
    if interpreted() or (x.is_cuda and gpu_kernel() == "triton"):
        return importlib.import_module(f"keepkv_sglang.kernels.{op}.triton_impl")
    return cpu_build.implementation(op) if x.is_cpu else None
