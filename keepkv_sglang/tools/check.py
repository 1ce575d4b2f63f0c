"""`keepkv check`: what runs here, why, and whether this SGLang is the one we know.

What may be missing or broken is imported where it is used, so that the others are still reported.
"""

from __future__ import annotations

import argparse
import logging
import platform as host
import sys
import warnings
from importlib import metadata
from typing import Any

PACKAGES = ("keepkv-sglang", "sglang", "torch", "triton", "transformers", "openai")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `keepkv check`."""
    parser.add_argument("--sglang", metavar="VERSION", help="which names are different in that SGLang (asks PyPI)")


def run(args: argparse.Namespace) -> int:
    """Looks at what is installed, or at another SGLang."""
    if args.sglang:
        from keepkv_sglang.tools import drift  # it must import here; a broken SGLang is reported all the same

        return drift.run(args.sglang)
    return report()


def report() -> int:
    """Print the report on stdout. Returns 0, or 1 with the reasons when something does not match."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing SGLang warns and logs pages about devices that are absent
        logging.disable(logging.WARNING)
        try:
            problems = [*_versions(), *_platform(), *_kernel(), *_seams()]
        finally:
            logging.disable(logging.NOTSET)
    for problem in problems:
        print(f"keepkv check: {problem}", file=sys.stderr)
    print("\nready" if not problems else f"\nnot ready: {len(problems)} problem(s)")
    return 1 if problems else 0


def _versions() -> list[str]:
    """Installed versions beside the exact pins in our own metadata."""
    _row("python", host.python_version())
    problems = []
    for name in PACKAGES:
        version = _version(name)
        _row(name, version or "not installed")
        if version is None:
            problems.append(f"{name} is not installed; install keepkv-sglang with its dependencies")
    wanted = _sglang_pin()
    installed = _version("sglang")
    if wanted and installed and installed != wanted:
        problems.append(f"SGLang {installed} is installed, {wanted} is needed: pip install sglang=={wanted}")
    return problems


def _platform() -> list[str]:
    """The platform SGLang would choose in this process, and our reason for taking part or not."""
    from keepkv_sglang.start import platform

    decision = platform.decide()
    try:
        from sglang.srt.platforms import current_platform

        chosen = f"{type(current_platform).__name__} (device {current_platform.device_name})"
    except Exception as error:  # SGLang raises anything from ImportError to RuntimeError here
        _row("platform", "SGLang has none")
        return [f"SGLang could not choose a platform: {_first_line(error)}"]
    _row("platform", f"{chosen}: {decision.reason}")
    return []


def _kernel() -> list[str]:
    """Which implementation computes attention on this machine's CPU."""
    try:
        from keepkv_sglang.kernels import attention
    except ImportError as error:
        _row("CPU kernel", f"missing: {_first_line(error)}")
        return [f"the attention kernels cannot be imported: {_first_line(error)}"]
    try:
        kernel = attention.load()
    except Exception as error:  # a compiler can fail in any way
        _row("CPU kernel", "none")
        return [f"no attention kernel could be built: {_first_line(error)}"]
    _row("CPU kernel", str(getattr(kernel, "name", kernel)))
    return []


def _seams() -> list[str]:
    """Every SGLang name we call or override, from the table in seams.py."""
    try:
        from keepkv_sglang.start import seams

        results: list[Any] = seams.check_all()
    except Exception as error:
        return [f"the table of SGLang seams cannot be checked: {_first_line(error)}"]
    print(f"\nSGLang seams ({sum(result.ok for result in results)} of {len(results)} match)")
    for result in results:
        print(f"  {'ok ' if result.ok else 'BAD'} {result.name}" + (f": {result.reason}" if not result.ok else ""))
    return [f"seam {result.name}: {result.reason}" for result in results if not result.ok]


def _sglang_pin() -> str | None:
    """The exact SGLang version that our installed metadata asks for."""
    try:
        requirements = metadata.requires("keepkv-sglang") or []
    except metadata.PackageNotFoundError:
        return None
    pins = [line.partition("==")[2].strip() for line in requirements if line.startswith("sglang==")]
    return pins[0] if pins else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"


def _row(label: str, value: str) -> None:
    print(f"{label:14} {value}")
