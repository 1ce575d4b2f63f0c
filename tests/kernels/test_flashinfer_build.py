"""The build of the FlashInfer kernels without a GPU: what can be checked in seconds, and the compilation as a soak
test."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import subprocess

import pytest
import torch

from keepkv_sglang.kernels.attention import flashinfer_build as build
from keepkv_sglang.kernels.attention import flashinfer_table as table
from keepkv_sglang.kernels.attention import flashinfer_variants as variants

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 71 registers, used 1 barriers, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_80'
ptxas info    : Function properties for _Z6secondPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_ptxas_output_is_read():
    assert table.parse(PTXAS) == {"first": [71, 12, 8], "second": [40, 0, 0]}
    with pytest.raises(RuntimeError, match="no kernels"):
        table.parse("ninja: no work to do.")
    with pytest.raises(RuntimeError, match="no kernels"):
        table.parse(PTXAS.rsplit("ptxas", 1)[0])  # the last kernel's resources are missing


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        ({"a": [64, 0, 0], "b": [32, 4, 4]}, ""),
        ({"a": [60, 0, 0], "b": [32, 0, 0]}, ""),
        ({"a": [65, 0, 0], "b": [32, 4, 4]}, "a: registers 64 -> 65"),
        ({"a": [64, 4, 0], "b": [32, 4, 4]}, "a: bytes of spill stores 0 -> 4"),
        ({"a": [64, 0, 0], "b": [32, 4, 5]}, "b: bytes of spill loads 4 -> 5"),
        ({"a": [64, 0, 0]}, "b: not in the build"),
        ({"a": [64, 0, 0], "b": [32, 4, 4], "c": [1, 0, 0]}, "c: not in the table"),
    ],
)
def test_a_regression_is_named(now, complaint):
    assert table.compare({"a": [64, 0, 0], "b": [32, 4, 4]}, now) == ([complaint] if complaint else [])


def test_the_gate_fails_on_a_regression(monkeypatch, capsys):
    job = build.JOBS[0]
    recorded = table.load()
    kernels = {name: list(used) for name, used in recorded["jobs"][job.name]["kernels"].items()}
    monkeypatch.setattr(build, "versions", lambda: recorded["versions"])
    monkeypatch.setattr(build, "build", lambda *_: {"module": "m", "kernels": kernels})
    assert build.main(["--gate", job.name]) == 0
    next(iter(kernels.values()))[0] += 1
    assert build.main(["--gate", job.name]) == 1
    assert "registers" in capsys.readouterr().out


def test_the_committed_table_is_of_the_declarations_in_the_source():
    """A changed declaration has another module name: compile it (make flashinfer-gate, then --write) and look."""
    recorded = table.load()
    assert list(recorded["jobs"]) == [job.name for job in build.JOBS]
    current = {
        "decode": variants.decode_args,
        "prefill": variants.prefill_args,
        "fa3": functools.partial(variants.fa3_args, experimental=True),
    }
    for job in build.JOBS:
        built = recorded["jobs"][job.name]
        assert built["kernels"]
        if job.kind in current:
            assert built["module"] == current[job.kind](torch.bfloat16, job.head_dim)[0], job.name
        if "decode" in job.kind or "fa3" in job.kind:
            assert all(stores == loads == 0 for _, stores, loads in built["kernels"].values()), "a kernel spills"
    assert recorded["versions"]["flashinfer"] == importlib.metadata.version("flashinfer-python")
    assert table.TABLE.read_text() == table.render(recorded)


def test_the_readme_shows_the_table():
    assert table.summary(table.load()) in (table.TABLE.parent / "README.md").read_text()


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
def test_cuda_home_has_what_the_wheels_lack(tmp_path):
    toolkit = tmp_path / "nvidia" / "cu13"
    for folder in ("bin", "include", "nvvm", "lib"):
        (toolkit / folder).mkdir(parents=True)
    (toolkit / "lib" / "libcudart.so.13").write_bytes(b"")
    home = build.cuda_home(toolkit, tmp_path / "cache")
    assert os.readlink(home / "lib64" / "libcudart.so") == str(toolkit / "lib" / "libcudart.so.13")
    assert (home / "bin").resolve() == toolkit / "bin" and (home / "lib").resolve() == (home / "lib64").resolve()
    symbols = subprocess.run(["readelf", "-d", home / "lib64/stubs/libcuda.so"], capture_output=True, text=True).stdout
    assert "libcuda.so.1" in symbols
    assert build.cuda_home(toolkit, tmp_path / "cache") == home  # once
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [home.name]


def test_unknown_jobs_are_refused(capsys):
    with pytest.raises(SystemExit):
        build.main(["decode sm_70"])
    assert "decode sm_80" in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_kernels_compile_and_need_no_more_than_recorded():
    assert build.main(["--gate"]) == 0
