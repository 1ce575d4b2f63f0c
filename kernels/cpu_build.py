"""Compiles the C++ of an op, <op>/cpu_<op>.cpp, for this machine; `python -m keepkv_sglang.kernels.cpu_build` does it
for all of them ahead of use.

A library lies in ${KEEPKV_CACHE:-~/.cache/keepkv}/kernels under two hashes: of sources, flags, CPU model and OpenMP
runtime, and of the compiler's version and arguments. A machine without a compiler takes one that another compiled into
the folder. It is written beside its final name and renamed, so processes can race.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
OPS = ("attention", "score", "merge", "codec")
NO_MEMORY = 3  # kNoMemory of cpu_vec.h
# No -ffast-math: masked entries are -inf. Contraction to fused multiply-add is allowed and wanted.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wno-psabi")
# codec: its bytes are torch's, which multiplies and adds with two roundings.
OP_FLAGS = {"codec": ("-ffp-contract=off",)}


def compiler() -> list[str]:
    """$CXX (with arguments, as in "ccache g++"), g++, c++ or clang++. RuntimeError when there is none."""
    named = os.environ.get("CXX", "").strip()
    try:
        words = [named] if shutil.which(named) else shlex.split(named)  # a path may hold spaces
    except ValueError as error:
        raise RuntimeError(f"CXX={named} cannot be read: {error}") from error
    for command in [words] if words else [["g++"], ["c++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise RuntimeError(f"no C++ compiler ({named or 'g++, c++, clang++'}): install g++ or set CXX")


def openmp_runtime() -> str | None:
    """The OpenMP library torch has loaded: a second runtime's threads would spin against torch's."""
    import torch  # noqa: F401  (loads its runtime)

    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    loaded = [p for p in sorted(paths) if Path(p).name.startswith(("libgomp", "libiomp5", "libomp"))]
    bundled = [p for p in loaded if "torch" in Path(p).parts or "torch.libs" in Path(p).parts]
    return next(iter(bundled or loaded), None)


def cpu_model() -> str:
    """What -march=native resolves to, near enough: model name and feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "CPU part", "Features")
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in wanted)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def cache_dir() -> Path:
    root = os.environ.get("KEEPKV_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "keepkv") / "kernels"


def sources(op: str) -> list[Path]:
    """The files that an op's library is made of."""
    return [*sorted(HERE.glob("*.h")), *sorted((HERE / op).glob("*.h")), HERE / op / f"cpu_{op}.cpp"]


def build(op: str, march: str = "native") -> Path:
    """Path of the op's compiled library, compiling it (seconds) if the cache has none of this compiler, or of any where
    there is no compiler. RuntimeError with the reason.

    march: the instruction set; tests compile the AVX2 and the portable path of the sources on any x86
    machine.
    """
    runtime, flags = openmp_runtime(), (*FLAGS, *OP_FLAGS.get(op, ()), f"-march={march}")
    digest = hashlib.sha256()
    for part in (*flags, cpu_model(), str(runtime)):
        digest.update(os.fsencode(part) + b"\0")
    for source in sources(op):
        digest.update(source.read_bytes())
    name = f"{op}-{digest.hexdigest()[:20]}"
    try:
        cxx = compiler()
        version = _run([*cxx, "--version"])
    except RuntimeError:
        if found := sorted(cache_dir().glob(f"{name}-*.so")):
            return found[0]
        raise
    by = hashlib.sha256("\0".join([*cxx[1:], version]).encode()).hexdigest()
    target = cache_dir() / f"{name}-{by[:8]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            obj, lib = f"{folder}/{op}.o", f"{folder}/{op}.so"
            _run([*cxx, *flags, "-fopenmp", "-c", str(sources(op)[-1]), "-o", obj])
            link = [*cxx, "-shared", obj, "-o", lib, "-Wl,-z,defs"]
            plans = [["-fopenmp"]]
            if runtime:
                # By path, and without -fopenmp, which would name the system's runtime as well.
                plans.insert(0, [runtime, f"-Wl,-rpath,{Path(runtime).parent}"])
            for plan in plans:
                try:
                    _run(link + plan)
                    break
                except RuntimeError:
                    if plan is plans[-1]:
                        raise
            os.replace(lib, target)
    except OSError as error:
        message = f"cannot write {target.parent}: {error}; set KEEPKV_CACHE to a writable folder"
        raise RuntimeError(message) from error
    return target


def load(path: Path, function: str) -> Callable[..., int]:
    """The library's `function`, which takes a struct by address and flags. RuntimeError when it cannot be loaded."""
    try:
        found = getattr(ctypes.CDLL(str(path)), function)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"cannot load {path}: {error}; delete it and try again") from error
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]


def raise_for(code: int) -> None:
    """MemoryError for the status of an op whose scratch memory could not be had (guard() of cpu_vec.h)."""
    if code == NO_MEMORY:
        raise MemoryError("no memory for a CPU kernel's scratch: give the process more, or fewer other tensors")


def implementation(op: str) -> ModuleType | None:
    """The op's cpp_impl, or None where it cannot run (no compiler, no library) or KEEPKV_CPU_KERNEL is another.

    Then torch computes the same, more slowly. A failure is logged once to the "keepkv" logger.
    """
    return _loaded(op) if (os.environ.get("KEEPKV_CPU_KERNEL") or "auto") in ("auto", "cpp") else None


@cache
def _loaded(op: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"keepkv_sglang.kernels.{op}.cpp_impl")
    except (ImportError, RuntimeError, OSError) as error:
        logging.getLogger("keepkv").warning("CPU kernel cpp of %s cannot run, torch computes it: %s", op, error)
        return None


if __name__ == "__main__":
    for name in OPS:
        print(build(name))
