"""Compile every Triton kernel for GPUs that are not here, and compare registers and spills with a committed table.

    python -m keepkv_sglang.kernels.compile_gate --cases keepkv_sglang.tools.compile_cases      (make compile-gate)

A launch is recorded, not described: each case calls the same Python function that a server calls, on small CPU tensors,
with Triton's launcher replaced. So tiles, warps and specialisation (divisibility by 16, arguments that are 1) are those
of a real call. Triton then compiles for (sm_80, sm_90, sm_100) without a driver; registers and stack are read from the
cubin with the cuobjdump that Triton ships, spills from its ptxas.

This proves that a kernel compiles and how many registers it takes. It runs nothing, and says nothing about speed.

The kernels are imported where they are used: Triton reads its environment when they are defined.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
TABLE = HERE / "compile_table.json"
README = HERE / "README.md"
ARCHS = (80, 90, 100)
# Another Triton patch release moves a few registers; a lost occupancy step or a bad edit moves more.
REGISTER_MARGIN = 16
# A cases module has cases(arch) -> {name: function to call}; see own_cases.
Cases = dict[str, Callable[[], object]]
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as Triton would specialise it: a jitted function, ASTSource's three tables, options."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int], Any]
    attrs: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, stack bytes, bytes of spill stores; per block: shared memory in bytes."""

    registers: int
    stack: int
    spills: int
    shared: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of running them; for one thread. RuntimeError in a process that interprets."""
    function = triton.runtime.JITFunction
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels of this process cannot be compiled; unset it")
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> None:
        launches.append(_specialise(self, args, kwargs))

    original, function.run = function.run, run
    try:
        yield launches
    finally:
        function.run = original


def _specialise(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
    values = {p.name: p.default for p in kernel.params if p.has_default}
    values |= dict(zip(names, args, strict=False)) | kwargs
    signature, constexprs, attrs = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = "constexpr"
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            constexprs[(i,)] = value
        elif isinstance(value, torch.Tensor):
            kind = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not plain:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            kind = "fp32"
        signature[parameter.name] = kind
    return Launch(kernel, signature, constexprs, attrs, options)


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compiles for compute capability arch / 10. Raises what Triton raises when the kernel does not compile."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump printed no resources: {usage[-500:]}")
        spills = 0
        if int(found[2]):  # spilled registers live on the stack; so may other things
            ptx = Path(folder) / "kernel.ptx"
            ptx.write_text(built.asm["ptx"])
            name = "ptxas-blackwell" if arch >= 100 else "ptxas"
            target = re.search(r"\.target (sm_\w+)", built.asm["ptx"])
            assert target is not None
            log = _tool(name, "-v", f"--gpu-name={target[1]}", ptx, "-o", Path(folder) / "again.cubin")
            spills = max(int(x) for x in re.findall(r"(\d+) bytes spill stores", log))
    return Resources(int(found[1]), int(found[2]), spills, built.metadata.shared)


def _tool(name: str, *arguments: Any) -> str:
    done = subprocess.run([_BIN / name, *arguments], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout + done.stderr


def own_cases(arch: int) -> Cases:
    """Our kernels, bfloat16 storage, head_dim 64 and 128, GQA 4; merging computes in float32 as the torch code does."""
    # Start-up cost, and Triton may be missing: only a process that compiles needs them.
    from .attention import triton_impl as attention
    from .attention import triton_packed as packed
    from .attention.packed import Layers, Packed
    from .codec import triton_impl as codec
    from .codec.layout import BLOCK_TOKENS, BlockLayout
    from .merge import triton_impl as merge
    from .merge.torch_impl import Segments
    from .score import triton_impl as score

    def pools(dim: int) -> tuple[torch.Tensor, ...]:
        return (
            torch.zeros(64, 2, dim, dtype=torch.bfloat16),
            torch.zeros(64, 2, dim, dtype=torch.bfloat16),
            torch.zeros(64, 2),
            torch.zeros(16, 32, dtype=torch.int32),
        )

    def attend(dim: int, new: int | None) -> None:
        q = torch.zeros(16 * (new or 1), 8, dim, dtype=torch.bfloat16)
        k, v, votes, table = pools(dim)
        rows, lens = torch.zeros(16, dtype=torch.int64), torch.full((16,), 32)
        if new is None:
            attention.decode(q, k, v, votes, table, rows, lens, 0.1, torch.empty_like(q))
        else:
            attention.extend(q, k, v, votes, table, rows, lens, torch.full((16,), new), 0.1, torch.empty_like(q))

    def attend_packed(dim: int, new: int | None) -> None:
        layers = Layers(*zip(*(pools(dim)[:3] for _ in range(4)), strict=True))  # of 4 layers
        numbers, indptr, first = (torch.zeros(n, dtype=torch.int32) for n in (64, 17, 17))
        cells = packed.CellTable(layers, numbers, torch.zeros(1, dtype=torch.int64))
        rows, lens, indices = (
            torch.zeros(16, dtype=torch.int64),
            torch.full((16,), 32),
            torch.zeros(512, dtype=torch.int64),
        )
        found = packed.cut(cells, pools(dim)[3], rows, lens, indptr, indices, first, new is None)
        q = torch.zeros(16 * (new or 1), 8, dim, dtype=torch.bfloat16)
        if new is None:
            packed.decode(q, found, 2, 0.1, torch.zeros(16, 8, 8, dim), torch.zeros(16, 8, 8), torch.empty_like(q))
        else:
            packed.extend(q, found, 2, 0.1, torch.arange(17) * new, torch.zeros(16 * new, 8), torch.empty_like(q))

    def gather_packed(dim: int) -> None:
        layers, spans = Layers(*zip(*(pools(dim)[:3] for _ in range(4)), strict=True)), torch.arange(3)
        start = torch.zeros(2, 9, dtype=torch.int64)
        packed.gather_cells(Packed(layers, spans[::2], spans * 8, torch.arange(16).int(), start), [1, 2], 40)

    def scores(dim: int, dtype: torch.dtype) -> None:
        q, k = torch.zeros(2, 64, dim), torch.zeros(64, 2, dim, dtype=dtype)
        votes, position = torch.zeros(64, 2), torch.arange(64)
        score.window_sums(q, position, k, votes, k, k, votes, torch.zeros(2, 64), True)

    def nearest(dim: int) -> None:
        k, half = torch.zeros(2, 64, dim, dtype=torch.bfloat16), torch.arange(32).expand(2, -1)
        merge.nearest_kept(k, half, half, torch.ones(2, 32, dtype=torch.bool))

    def merging(dim: int) -> None:
        k, assign = torch.zeros(2, 64, dim), torch.arange(64).expand(2, -1) % 32
        half = torch.arange(32).expand(2, -1)
        merge.nearest_kept(k, half, half, torch.ones(2, 32, dtype=torch.bool))
        merge.merge_segments(k, k, torch.zeros(2, 64), torch.zeros(128), Segments.from_assignment(assign, 32))
        for pool in pools(dim)[1:3]:  # K and V; votes
            merge.gather_slots(pool, torch.arange(32), pool.new_empty(2, 32, *pool.shape[2:]))

    def coding(name: str, dim: int, dtype: torch.dtype) -> None:
        k, v = (torch.zeros(64, 2, dim, dtype=dtype) for _ in range(2))
        layout, blocks, counts = BlockLayout(name, 2, dim, dim, dtype), torch.arange(16), torch.full((16,), 4)
        arena = torch.zeros(16, layout.block_bytes, dtype=torch.uint8)
        codec.encode(layout, k, v, torch.arange(BLOCK_TOKENS), arena, blocks, counts)
        codec.decode(layout, arena, blocks, counts, k, v, torch.arange(BLOCK_TOKENS))

    cases: Cases = {}
    for dim in (64, 128):
        cases[f"decode D{dim}"] = partial(attend, dim, None)
        cases[f"extend D{dim}"] = partial(attend, dim, 16)
        cases[f"packed decode D{dim}"] = partial(attend_packed, dim, None)
        cases[f"packed gather D{dim}"] = partial(gather_packed, dim)
        cases[f"packed extend D{dim}"] = partial(attend_packed, dim, 16)
        cases[f"score D{dim}"] = partial(scores, dim, torch.bfloat16)
        cases[f"score D{dim} float32"] = partial(scores, dim, torch.float32)
        cases[f"merge D{dim}"] = partial(merging, dim)
        cases[f"nearest D{dim}"] = partial(nearest, dim)
        for codec_name in ("int8", "int4"):
            cases[f"codec {codec_name} D{dim}"] = partial(coding, codec_name, dim, torch.bfloat16)
    for codec_name in ("int8", "int4"):
        cases[f"codec {codec_name} D128 float16"] = partial(coding, codec_name, 128, torch.float16)
    cases["codec native D128"] = partial(coding, "native", 128, torch.bfloat16)
    cases["codec int4 D256"] = partial(coding, "int4", 256, torch.bfloat16)
    cases["score D256"] = partial(scores, 256, torch.bfloat16)
    return cases


def measure(modules: list[str], archs: tuple[int, ...], only: str = "") -> dict[str, Resources]:
    """{"case: kernel, sm_NN": resources} for our cases and those of the modules whose name contains `only`."""
    makers = [own_cases, *(importlib.import_module(name).cases for name in modules)]
    rows: dict[str, Resources] = {}
    for arch in archs:
        for name, call in [item for make in makers for item in make(arch).items()]:
            if only not in name:
                continue
            with recorded() as launches:
                call()
            seen: Counter[str] = Counter()
            for launch in launches:
                kernel = launch.kernel.__name__
                seen[kernel] += 1
                number = f" ({seen[kernel]})" if seen[kernel] > 1 else ""
                rows[f"{name}: {kernel}{number}, sm_{arch}"] = compile_launch(launch, arch)
    return rows


def differences(rows: dict[str, Resources], table: dict[str, Any]) -> list[str]:
    """What is worse than the table, in words: registers beyond the margin, any spill beyond it, rows it lacks."""
    problems = []
    for name, new in rows.items():
        if name not in table["rows"]:
            problems.append(f"{name}: not in the table; run with --update and commit it")
            continue
        old = Resources(**table["rows"][name])
        if new.registers > old.registers + REGISTER_MARGIN:
            problems.append(f"{name}: {new.registers} registers, the table has {old.registers}")
        if new.spills > old.spills:
            problems.append(f"{name}: {new.spills} bytes spilled, the table has {old.spills}")
    return problems


def load_table() -> dict[str, Any]:
    """{"triton": version, "rows": {name: fields of Resources}}; empty rows when there is none yet."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": triton.__version__, "rows": {}}


def markdown(table: dict[str, Any]) -> str:
    """The table for README.md: registers per thread, + bytes spilled, / shared memory per block in KiB."""
    names = dict.fromkeys(name.rsplit(", ", 1)[0] for name in table["rows"])
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |", "|---|" + "---|" * len(ARCHS)]
    for name in names:
        cells = []
        for arch in ARCHS:
            row = table["rows"].get(f"{name}, sm_{arch}")
            spilled = f" + {row['spills']} B" if row and row["spills"] else ""
            cells.append(f"{row['registers']}{spilled} / {row['shared'] / 1024:.0f}" if row else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 when something is worse than the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", action="append", default=[], help="module with cases(arch), of kernels elsewhere")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="default: all of them")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--update", action="store_true", help="write the table and README.md instead of comparing")
    options = parser.parse_args(arguments)
    rows = measure(options.cases, tuple(options.arch or ARCHS), options.only)
    table = load_table()
    problems = differences(rows, table)
    if options.update:
        whole = not options.arch and not options.only
        table["rows"] = ({} if whole else table["rows"]) | {name: asdict(row) for name, row in rows.items()}
        table["triton"] = triton.__version__
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        begin, end = "<!-- compile table -->\n", "\n<!-- end of compile table -->"
        head, rest = README.read_text().split(begin)
        README.write_text(head + begin + markdown(table) + end + rest.split(end)[1])
    for problem in problems:
        print(problem)
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__}, {len(problems)} worse than {TABLE.name}")
    return 1 if problems and not options.update else 0


if __name__ == "__main__":
    sys.exit(main())
