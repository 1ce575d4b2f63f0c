"""Compiles the FlashInfer variants without a GPU and records what ptxas says: registers and spills, per kernel.

    python -m keepkv_sglang.kernels.attention.flashinfer_build [--gate | --write] [JOB ...]

The compiler is the nvcc of the pip wheels (nvidia/cu13), so that the numbers compare between machines; on a machine
with a GPU FlashInfer builds with the CUDA toolkit it finds, and nothing here is needed. `--gate` fails when a kernel
uses more registers or spills more than flashinfer_table.json says, `--write` replaces the rows that were built.
Objects are kept under ${KEEPKV_CACHE:-~/.cache/keepkv}/flashinfer.

FlashInfer and torch are imported where they are used: the file is read without them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepkv_sglang.kernels.cpu_build import cache_dir

from . import flashinfer_table

# nvcc and the CUDA headers come in wheels of different versions; CCCL refuses such a pair by default.
CUDA_FLAGS = "-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK -Xptxas -v"


@dataclass(frozen=True)
class Job:
    """One module for one architecture. target: the part of an object's name to build, "" for the linked library."""

    kind: str
    arch: str
    target: str = ""
    head_dim: int = 64

    @property
    def name(self) -> str:
        part = f" {self.target}" if self.target else ""
        size = f" d{self.head_dim}" if self.head_dim != 64 else ""
        return f"{self.kind}{part} sm_{self.arch.replace('.', '')}{'a' if self.arch == '9.0' else ''}{size}"


# bfloat16. mask_1 is causal, mask_2 a packed custom mask (FlashInfer's MaskMode); the other objects of a
# prefill module differ from these in a constant.
JOBS = (
    Job("decode", "8.0"),
    Job("decode", "9.0"),
    Job("prefill", "8.0", "paged_kernel_mask_1"),
    Job("prefill", "9.0", "paged_kernel_mask_1"),
    Job("prefill", "9.0", "paged_kernel_mask_2"),
    Job("fa3", "9.0", "paged_sm90_kernel_mask_1"),
    Job("decode", "9.0", "batch_decode_kernel", 128),
    Job("prefill", "9.0", "paged_kernel_mask_1", 128),
    # FlashInfer's own kernels, without votes: what of the registers and spills is not ours.
    Job("stock decode", "9.0", "batch_decode_kernel"),
    Job("stock prefill", "9.0", "paged_kernel_mask_1"),
    Job("stock fa3", "9.0", "paged_sm90_kernel_mask_1"),
    Job("stock decode", "9.0", "batch_decode_kernel", 128),
    Job("stock prefill", "9.0", "paged_kernel_mask_1", 128),
)


def wheels() -> Path:
    """Folder of the pip wheels' CUDA toolkit. RuntimeError, with what to install, when nvcc is not among them."""
    for entry in sys.path:
        for toolkit in sorted(Path(entry).glob("nvidia/cu*"), reverse=True):
            if (toolkit / "bin" / "nvcc").exists():
                return toolkit
    raise RuntimeError("no nvcc among the installed wheels: pip install nvidia-cuda-nvcc nvidia-cuda-cccl")


def cuda_home(toolkit: Path | None = None, root: Path | None = None) -> Path:
    """A CUDA_HOME made of links to the wheels, under the cache folder; made once. No root, no driver.

    The wheels lack three things that FlashInfer's link line asks for: a lib64 folder, libcudart.so without a version,
    and libcuda, which the driver would bring. An empty library with libcuda's soname satisfies the linker.
    RuntimeError without nvcc or a C compiler.
    """
    toolkit = toolkit or wheels()
    target = (root or cache_dir().parent / "flashinfer") / f"cuda-{_digest(toolkit)}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "home"
        (made / "lib64" / "stubs").mkdir(parents=True)
        for name in ("bin", "include", "nvvm"):  # nvcc.profile finds its parts beside bin
            (made / name).symlink_to(toolkit / name)
        for library in (toolkit / "lib").iterdir():
            (made / "lib64" / library.name).symlink_to(library)
        runtime = sorted((toolkit / "lib").glob("libcudart.so.*"))
        if not runtime:
            raise RuntimeError(f"no libcudart in {toolkit}/lib: pip install nvidia-cuda-runtime")
        if not (made / "lib64" / "libcudart.so").exists():
            (made / "lib64" / "libcudart.so").symlink_to(runtime[0])
        (made / "lib").symlink_to("lib64")
        stub = made / "lib64" / "stubs" / "libcuda.so"
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("no C compiler for libcuda's stub: install gcc or set CC")
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-Wl,-soname,libcuda.so.1", "-o", str(stub)]
        subprocess.run(command, input=b"\n", check=True, capture_output=True)
        try:
            os.replace(made, target)
        except OSError:
            if not target.exists():  # otherwise another process was faster
                raise
    return target


def _digest(toolkit: Path) -> str:
    return hashlib.sha256(str(toolkit.resolve()).encode()).hexdigest()[:10]


def environment(arch: str) -> dict[str, str]:
    """What a process must set before it imports flashinfer to build for arch ("8.0", "9.0") here."""
    return {
        **os.environ,
        "CUDA_HOME": str(cuda_home()),
        "FLASHINFER_CUDA_ARCH_LIST": arch,
        "FLASHINFER_EXTRA_CUDAFLAGS": CUDA_FLAGS,
        "FLASHINFER_WORKSPACE_BASE": str(cache_dir().parent / "flashinfer" / f"sm{arch}"),
        "FLASHINFER_DISABLE_VERSION_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def generate(kind: str, head_dim: int) -> dict[str, Any]:
    """Writes FlashInfer's sources and ninja file of a module; runs in a process started with `environment`.

    Returns {"module", "dir", "ninja", "library"} as strings. kind: of a Job; KeyError otherwise.
    """
    import torch
    from flashinfer.jit.attention import modules

    from . import flashinfer_variants as variants

    dtype = torch.bfloat16
    types = (dtype, dtype, dtype, torch.int32, head_dim, head_dim)
    plain = (0, False, False)  # no position encoding, no sliding window, no soft cap
    decode, prefill = modules.gen_customize_batch_decode_module, modules.gen_customize_batch_prefill_module
    spec = {
        "decode": lambda: decode(*variants.decode_args(dtype, head_dim)),
        "prefill": lambda: prefill("fa2", *variants.prefill_args(dtype, head_dim)),
        "fa3": lambda: prefill("fa3", *variants.fa3_args(dtype, head_dim, experimental=True)),
        "stock decode": lambda: modules.gen_batch_decode_module(*types, *plain),
        "stock prefill": lambda: modules.gen_batch_prefill_module("fa2", *types, *plain, False),
        "stock fa3": lambda: modules.gen_batch_prefill_module("fa3", *types, *plain, False),
    }[kind]()
    spec.write_ninja()
    paths = {"dir": spec.build_dir, "ninja": spec.ninja_path, "library": spec.jit_library_path}
    return {"module": spec.name, **{name: str(path) for name, path in paths.items()}}


def build(job: Job, jobs: int = 1) -> dict[str, Any]:
    """Compiles job from scratch, in 20 to 100 s of one core.

    Returns {"module": FlashInfer's name of it, "kernels": {kernel: [registers, spill stores, spill loads]}}, spills in
    bytes. RuntimeError with the compiler's last words.
    """
    env = environment(job.arch)
    child = [sys.executable, "-m", f"{__package__}.flashinfer_build"]
    made = json.loads(_run([*child, "--generate", job.kind, str(job.head_dim)], env).splitlines()[-1])
    targets = [made["library"]]
    if job.target:
        rules = Path(made["ninja"]).read_text()
        targets = [m for m in re.findall(r"^build (\S+\.cuda\.o):", rules, re.M) if job.target in m]
        if not targets:
            raise RuntimeError(f"FlashInfer generates no object named *{job.target}* for {job.kind}")
    ninja = ["ninja", "-C", made["dir"], "-f", made["ninja"], "-j", str(jobs), "-v"]
    _run([*ninja, "-t", "clean"], env)
    output = _run([*ninja, *targets], env)
    if not job.target:
        _check_loads(Path(made["library"]))
    return {"module": made["module"], "kernels": dict(sorted(flashinfer_table.parse(output).items()))}


def _check_loads(library: Path) -> None:
    """The linked module loads and has the functions the wrappers call; needs no driver."""
    code = f"import torch, tvm_ffi; m = tvm_ffi.load_module({str(library)!r}); m.plan, m.run"
    _run([sys.executable, "-c", code], dict(os.environ))


def _run(command: Sequence[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)[:300]}` failed: {done.stdout[-3000:]}")
    return done.stdout


def versions() -> dict[str, str]:
    """What the numbers depend on: FlashInfer and the compiler."""
    text = _run([str(wheels() / "bin" / "nvcc"), "--version"], dict(os.environ))
    release = re.search(r"V(\d+\.\d+\.\d+)", text)
    return {
        "flashinfer": importlib.metadata.version("flashinfer-python"),
        "nvcc": release.group(1) if release else "unknown",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"some of: {', '.join(job.name for job in JOBS)}")
    parser.add_argument("--gate", action="store_true", help="fail on a regression against the table")
    parser.add_argument("--write", action="store_true", help="replace the built rows of the table")
    parser.add_argument("--generate", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("-j", type=int, default=int(os.environ.get("MAX_JOBS", "1")), help="parallel compilations")
    args = parser.parse_args(arguments)
    if args.generate:
        print(json.dumps(generate(args.generate[0], int(args.generate[1]))))
        return 0
    chosen = [job for job in JOBS if not args.jobs or job.name in args.jobs]
    if unknown := set(args.jobs) - {job.name for job in chosen}:
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(job.name for job in JOBS)}")
    table, now = flashinfer_table.load(), versions()
    if args.gate and table["versions"] != now:
        print(f"the table is of {table['versions']}, here is {now}: registers may differ", file=sys.stderr)
    failed = False
    for job in chosen:
        built = build(job, args.j)
        kernels = built["kernels"]
        registers, stores = max(k[0] for k in kernels.values()), max(k[1] for k in kernels.values())
        print(f"{job.name}: {len(kernels)} kernels, at most {registers} registers, {stores} bytes spilled", flush=True)
        recorded = table["jobs"].get(job.name, {"kernels": {}})["kernels"]
        for line in flashinfer_table.compare(recorded, kernels) if args.gate else ():
            failed = True
            print(f"  {line}")
        if args.write:
            table = flashinfer_table.load()
            table["versions"], table["jobs"][job.name] = now, built
            table["jobs"] = {job.name: table["jobs"][job.name] for job in JOBS if job.name in table["jobs"]}
            flashinfer_table.save(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
