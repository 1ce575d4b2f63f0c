"""The compile gate: it records real launches, reads resources, and notices what gets worse. No GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from keepkv_sglang.kernels import compile_gate
from keepkv_sglang.kernels.compile_gate import Resources

CASES = "keepkv_sglang.tools.compile_cases"


def test_kernels_at_head_dim_64_are_no_worse_than_the_table():
    """A third of `make compile-gate`, ours and SGLang's with votes; cached by Triton after the first run."""
    for only, modules in (("D64", []), ("extend votes D64", [CASES]), ("decode votes D64", [CASES])):
        rows = compile_gate.measure(modules, (90,), only)
        assert len(rows) >= 1 + 7 * (not modules)
        assert not compile_gate.differences(rows, compile_gate.load_table())


def test_the_table_covers_every_kernel_and_every_gpu():
    rows = compile_gate.load_table()["rows"]
    kernels = {name.rsplit(", ", 1)[0] for name in rows}
    assert len(kernels) == 101 and len(rows) == 101 * len(compile_gate.ARCHS)
    assert compile_gate.markdown(compile_gate.load_table()) in compile_gate.README.read_text()


def test_a_rise_is_refused():
    table = json.loads(json.dumps(compile_gate.load_table()))
    name = "decode D64: decode_split, sm_90"
    row = Resources(**table["rows"][name])
    margin = compile_gate.REGISTER_MARGIN
    assert not compile_gate.differences({name: replace(row, registers=row.registers + margin)}, table)
    (problem,) = compile_gate.differences({name: replace(row, registers=row.registers + margin + 1)}, table)
    assert "registers" in problem and name in problem
    (problem,) = compile_gate.differences({name: replace(row, spills=row.spills + 4)}, table)
    assert "spilled" in problem
    (problem,) = compile_gate.differences({"new: kernel, sm_90": row}, table)
    assert "--update" in problem


def test_a_kernel_that_spills_is_seen():
    """512 live float32 per thread cannot fit 255 registers: the numbers come from the compiled code. (How many
    registers ptxas then reports is its own affair: 64 here, and 32 for the worst kernel we had.)"""
    import triton
    import triton.language as tl

    @triton.jit
    def much(x_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        x = tl.load(x_ptr + i)
        y = tl.load(x_ptr + tl.sum(x, 0).to(tl.int32) + i)
        tl.store(x_ptr + i, x * y)

    with compile_gate.recorded() as launches:
        much[(1,)](torch.zeros(16384), N=16384, num_warps=1)
    (launch,) = launches
    assert launch.signature == {"x_ptr": "*fp32", "N": "constexpr"} and launch.options == {"num_warps": 1}
    row = compile_gate.compile_launch(launch, 90)
    assert row.spills > 0 and row.stack > 0


def test_the_interpreter_and_the_compiler_need_two_processes():
    code = "from keepkv_sglang.kernels import compile_gate as g\nwith g.recorded(): pass"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize("value", [1, 16, 7, 1 << 40])
def test_specialisation_is_tritons(value):
    import triton

    @triton.jit
    def kernel(x_ptr, n, s):
        pass

    with compile_gate.recorded() as launches:
        kernel[(1,)](None, value, 0.5)
    (launch,) = launches
    kinds = {1: "constexpr", 16: "i32", 7: "i32", 1 << 40: "i64"}
    assert launch.signature == {"x_ptr": "constexpr", "n": kinds[value], "s": "fp32"}
    assert ((1,) in launch.attrs) == (value in (16, 1 << 40))
