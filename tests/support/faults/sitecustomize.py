"""Put first on PYTHONPATH by test_faults.py: one function of KeepKV, named in the file KEEPKV_FAULT, raises.

A scheduler is a process of its own, started by SGLang: this is how a test reaches into it.
"""

import os
import runpy
import sys
from pathlib import Path

FUNCTIONS = (
    "runtime.due.begin_row",
    "runtime.due.plan_chunk",
    "hooks.extend.capture",
    "runtime.due.compress_due",
    "runtime.compressor.packed_pieces",
    "runtime.step.publish_rest",
    "runtime.pressure.relieve",
    "runtime.unpack._fill",
    "runtime.unpack._archive",
    "runtime.stream.propose",
    "runtime.stream.readings",
)


def wanted() -> str:
    try:
        with open(os.environ["KEEPKV_FAULT"]) as file:
            return file.read().strip()
    except (KeyError, OSError):
        return ""


def faulty(name, function):
    def call(*args, **kwargs):
        if wanted() == name:
            raise RuntimeError(f"injected into {name}")
        return function(*args, **kwargs)

    return call


def inject() -> None:
    """Wraps every guarded hook and the functions they call."""
    # here, since importing the hooks is what registers them as guarded
    from keepkv_sglang.faults import guard
    from keepkv_sglang.hooks import adder, admission, answers, extend, scheduler  # noqa: F401
    from keepkv_sglang.radix.adapter import cache  # noqa: F401

    for name, hook in guard.GUARDED.items():
        hook.inner = faulty(name, hook.inner)
    for name in FUNCTIONS:
        module, function = name.rsplit(".", 1)
        module = sys.modules[f"keepkv_sglang.{module}"]
        setattr(module, function, faulty(name, getattr(module, function)))


if os.environ.get("KEEPKV_FAULT"):
    runpy.run_path(str(Path(__file__).parents[1] / "after_register.py"))["after_register"](inject)
