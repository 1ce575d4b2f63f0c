"""Builds every FlashInfer module that tests/kernels/test_flashinfer_gpu.py and gpu_bench.py use, all at once.

    python -m benchmarks.gpu_modules        exit status 77 when FlashInfer is not installed

FlashInfer compiles a module when it is first used, for some minutes of cores: inside a test's time limit, or inside a
measurement.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu_cases import DIM, DTYPE
from keepkv_sglang.kernels.attention.flashinfer_variants import DTYPES, decode_args, prefill_args

SKIPPED = 77  # what automake's tests exit with
TEST_DIM = 64  # DIM of test_flashinfer_gpu.py


def specs() -> list[Any]:
    """FlashInfer's JitSpecs, those with most objects first. ImportError without FlashInfer."""
    from flashinfer.jit.attention import modules
    from flashinfer.jit.quantization import gen_quantization_module

    decode, prefill = modules.gen_customize_batch_decode_module, modules.gen_customize_batch_prefill_module
    return [
        *(prefill("fa2", *prefill_args(dtype, TEST_DIM)) for dtype in DTYPES),
        *(decode(*decode_args(dtype, TEST_DIM)) for dtype in DTYPES),
        decode(*decode_args(DTYPE, DIM)),
        # no position encoding, no sliding window, no soft cap: what the wrapper asks for without jit_args
        modules.gen_batch_decode_module(DTYPE, DTYPE, DTYPE, torch.int32, DIM, DIM, 0, False, False),
        gen_quantization_module(),  # packs custom masks
    ]


def build(spec: Any) -> str:
    """In the module's own folder, as FlashInfer does when it is used: flashinfer.jit.build_jit_specs works in another,
    whose ninja log the later use does not see, and then everything is compiled again."""
    begun = time.monotonic()
    if not spec.is_aot:
        spec.build(verbose=False, need_lock=True)
    return f"{spec.name}: {time.monotonic() - begun:.0f} s"


def main() -> int:
    os.environ.setdefault("MAX_JOBS", str(max(1, (os.cpu_count() or 2) // 2)))  # of each ninja; two have most objects
    try:
        wanted = specs()
    except ImportError as error:
        print(f"FlashInfer is not installed: {error}")
        return SKIPPED
    with ThreadPoolExecutor(len(wanted)) as pool:
        for line in pool.map(build, wanted):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
