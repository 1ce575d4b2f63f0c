"""Builds every FlashInfer module that tests/kernels/test_flashinfer_gpu.py and bench.py use, all at once.

    python -m benchmarks.gpu.modules [READY]        exit status 77 when FlashInfer is not installed, 1 when one failed

READY: a file written once the modules that the benchmark uses are there, whatever becomes of the others. FlashInfer
compiles a module when it is first used, for some minutes of cores: inside a test's time limit, or inside a measurement.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import DIM, DTYPE, missing
from keepkv_sglang.kernels.attention.flashinfer_variants import DTYPES, decode_args, prefill_args

SKIPPED = 77  # what automake's tests exit with
TEST_DIM = 64  # DIM of test_flashinfer_gpu.py


def specs() -> tuple[list[Any], list[Any]]:
    """FlashInfer's JitSpecs of the benchmark and those of the tests. ModuleNotFoundError without FlashInfer."""
    from flashinfer.jit.attention import modules
    from flashinfer.jit.quantization import gen_quantization_module

    decode, prefill = modules.gen_customize_batch_decode_module, modules.gen_customize_batch_prefill_module
    # What get_batch_prefill_module compiles for fa2 (gen_batch_prefill_module is another module, for unequal strides
    # too): no position encoding, sliding window, soft cap or 16-bit products, as the wrapper asks without jit_args.
    stock = modules._gen_batch_prefill_primary_module(
        "fa2", DTYPE, DTYPE, DTYPE, torch.int32, DIM, DIM, 0, False, False, False
    )
    tests = [
        *(prefill("fa2", *prefill_args(dtype, TEST_DIM)) for dtype in DTYPES),
        *(decode(*decode_args(dtype, TEST_DIM)) for dtype in DTYPES),
        gen_quantization_module(),  # packs custom masks
    ]
    return [prefill("fa2", *prefill_args(DTYPE, DIM)), stock], tests


def build(spec: Any) -> str:
    """In the module's own folder, as FlashInfer does when it is used: flashinfer.jit.build_jit_specs works in another,
    whose ninja log the later use does not see, and then everything is compiled again. Returns what is wrong, or ""."""
    begun, wrong = time.monotonic(), ""
    try:
        if not spec.is_aot:
            spec.build(verbose=False, need_lock=True)
    except Exception as error:  # the others still count
        wrong = f"{spec.name}: {type(error).__name__}: {error}"
    print(wrong or f"{spec.name}: built, {time.monotonic() - begun:.0f} s", flush=True)
    return wrong


def build_all(measured: list[Any], tested: list[Any], ready: Path | None) -> int:
    """The exit status; `ready` is written once every one of `measured` is built."""
    with ThreadPoolExecutor(len(measured) + len(tested)) as pool:
        first, others = [[pool.submit(build, spec) for spec in part] for part in (measured, tested)]
        wrong = [text for job in first if (text := job.result())]
        if ready and not wrong:
            ready.touch()
        wrong += [text for job in others if (text := job.result())]
    print(f"{len(wrong)} of {len(measured) + len(tested)} modules failed", flush=True)
    return int(bool(wrong))


def main() -> int:
    os.environ.setdefault("MAX_JOBS", str(max(1, (os.cpu_count() or 2) // 2)))  # of each ninja; four have most objects
    try:
        measured, tested = specs()
    except ImportError as error:
        if not missing(error):
            raise
        print(f"FlashInfer is not installed: {error}")
        return SKIPPED
    return build_all(measured, tested, Path(sys.argv[1]) if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    sys.exit(main())
