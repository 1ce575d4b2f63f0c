"""Decide whether SGLang needs our plain-CPU platform on this machine.

Stock SGLang 0.5.23 does not start on a CPU without its AMX kernels. It asks `activate` through the
entry-point group ``sglang.srt.platforms``; wherever stock SGLang supports the machine (CUDA, ROCm, XPU, NPU,
MUSA, HPU, MPS, or its own CPU engine) the answer is None and nothing changes. Otherwise the answer names
`keepkv_sglang.start.platform_cpu.KeepKVCpuPlatform`, and ``python -m sglang.launch_server --model-path M`` works
with no further flags.

``KEEPKV_PLATFORM=off`` keeps the platform out. Importing this file imports neither torch nor SGLang.

torch is imported where it is used: start-up cost.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

CLASS_PATH = "keepkv_sglang.start.platform_cpu:KeepKVCpuPlatform"


@dataclass(frozen=True)
class Decision:
    """Whether our platform is used, and why, in words for `keepkv check`."""

    active: bool
    reason: str


def activate() -> str | None:
    """Entry point: the class path of our platform, or None to leave SGLang's own choice alone."""
    return CLASS_PATH if decide().active else None


def decide() -> Decision:
    """Look at the environment and at torch. Changes nothing; imports torch.

    Raises ValueError for a KEEPKV_PLATFORM that means nothing.
    """
    wish = os.environ.get("KEEPKV_PLATFORM", "auto").strip().lower()
    if wish not in ("", "auto", "off"):
        raise ValueError(f"KEEPKV_PLATFORM={wish!r} is not known; use 'auto' (the default) or 'off'.")
    if wish == "off":
        return Decision(False, "KEEPKV_PLATFORM=off")
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return Decision(False, "SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU engine")
    found = accelerator()
    if found:
        return Decision(False, f"SGLang supports the {found} device of this machine")
    if _stock_cpu_kernels():
        return Decision(False, "this CPU has AMX and SGLang's CPU kernels are installed; set SGLANG_USE_CPU_ENGINE=1")
    return Decision(True, "no accelerator, and SGLang's own CPU engine cannot run here")


def accelerator() -> str | None:
    """Name of a device stock SGLang would use, tested as SGLang's platforms/__init__.py does, or None."""
    import torch

    if torch.cuda.is_available():
        return "ROCm" if torch.version.hip is not None else "CUDA"
    for name, label in (("xpu", "XPU"), ("npu", "NPU"), ("hpu", "HPU"), ("mps", "MPS")):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return label
    if getattr(torch.version, "musa", None) is not None:
        return "MUSA"
    return None


def _stock_cpu_kernels() -> bool:
    """True where stock SGLang's CPU engine can run: AMX tiles and a CPU build of sgl_kernel.

    The PyPI wheel of sgl_kernel is CUDA-only, so an AMX machine with that wheel still needs our platform.
    Same test as sglang.srt.utils.common.cpu_has_amx_support, which cannot be imported while SGLang is
    still resolving its platform.
    """
    import torch

    try:
        if not torch.cpu._is_amx_tile_supported():
            return False
        importlib.import_module("sgl_kernel")
    except Exception:  # a CUDA-only sgl_kernel fails in many ways (ImportError, OSError, RuntimeError)
        return False
    return hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
