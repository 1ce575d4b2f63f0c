"""scripts/gpu_check.sh and what it writes, as far as that needs no GPU: steps that fail, are cut or are missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bench, gpu_report

REPO = Path(__file__).resolve().parent.parent
LOG = """
tests/kernels/test_a_triton.py::test_one[(3, 3)-80-torch.float32] PASSED [ 25%]
tests/kernels/test_a_triton.py::test_two FAILED                          [ 50%]
tests/kernels/test_a_triton.py::test_three SKIPPED (no SGLang)           [ 75%]
tests/kernels/test_a_triton.py::test_four[x-y] """
XML = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase classname="tests.kernels.test_a_triton" name="test_one"/>
<testcase classname="tests.kernels.test_a_triton" name="test_two"><failure message="assert 1 == 2&#10;more">x</failure></testcase>
<testcase classname="tests.kernels.test_a_triton" name="test_three"><skipped message="no SGLang">x</skipped></testcase>
</testsuite></testsuites>"""  # noqa: E501
ROW = {
    "kernel": "ours", "context": 2048, "batch": 1, "budget": 0.1, "slots": 205, "us_off": 10.0, "us_on": 11.0,
    "votes_cost": 0.1, "gb_per_s": 76.0, "graph": False, "in_l2": True, "differs_off": 0.0, "differs_on": 0.001,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def steps(folder, *lines):
    (folder / "logs" / "steps.txt").write_text("".join("\t".join(line) + "\n" for line in lines))


def test_a_report_names_what_failed_and_why(folder):
    steps(folder, ("triton", "1", "20", ""), ("sanitizer", "skipped", "0", "no compute-sanitizer"))
    (folder / "logs" / "triton.xml").write_text(XML)
    measured = {"device": "H", "copy_gb_per_s": 100.0, "rows": [ROW], "errors": ["sglang: RuntimeError: y"]}
    measured |= {"compression": [{"tokens": 2000, "torch_ms": 1.0}], "skipped": ["x: out of time"]}
    (folder / "bench.json").write_text(json.dumps(measured))
    text = gpu_report.report(folder)
    for part in (
        "| triton | 1 | 20 | 2 run, 1 failed, 1 skipped |", "test_two: assert 1 == 2\n", "1 of triton: no SGLang",
        "no compute-sanitizer", "| 76% | 0.0000, 0.0010 | L2 eager |", "ERROR: sglang: RuntimeError: y",
        "skipped: x: out of time", "| 2000 | 1.00 | - |", "torch ", "driver",
    ):  # fmt: skip
        assert part in text, part
    whole = json.loads((folder / "report.json").read_text())
    assert whole["bench"] == measured and whole["steps"]["triton"]["exit"] == "1"
    assert (folder / "report.md").read_text() == text and not list(folder.glob("*.part"))


@pytest.mark.parametrize("xml", [None, XML[:300]])
def test_a_step_that_was_cut_is_told_by_its_log(xml, folder):
    steps(folder, ("triton", "124", "240", "out of time"))
    (folder / "logs" / "triton.log").write_text(LOG)
    if xml:
        (folder / "logs" / "triton.xml").write_text(xml)
    (folder / "bench.json").write_text('{"rows": [{"kernel"')
    text = gpu_report.report(folder)
    assert "| triton | 124 | 240 | 2 run, 1 failed, 1 skipped | out of time |" in text
    assert "FAILED tests/kernels/test_a_triton.py::test_two" in text
    assert "triton was cut in tests/kernels/test_a_triton.py::test_four[x-y]" in text
    assert "No readable bench.json" in text


def test_nothing_at_all_and_a_crash_without_tests(folder):
    assert "No readable bench.json" in gpu_report.report(folder)
    steps(folder, ("small", "139", "3", ""))
    (folder / "logs" / "small.log").write_text("one\nSegmentation fault\n")
    assert "small ended with 139" in gpu_report.report(folder) and "Segmentation fault" in gpu_report.report(folder)


def test_only_what_is_missing_or_too_large_is_a_skip(tmp_path):
    result = gpu_bench.Result(tmp_path)
    result.note("a", ModuleNotFoundError("no flashinfer"))
    result.note("b", torch.OutOfMemoryError("8 GiB"))
    result.note("c", RuntimeError("illegal memory access"))
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [text[0] for text in written["skipped"]] == ["a", "b"]
    assert written["errors"] == ["c: RuntimeError: illegal memory access"]


def test_outputs_are_compared():
    gen = torch.Generator().manual_seed(0)
    exact = torch.randn(8, 32, 128, generator=gen) / 10
    rounded = exact.to(torch.bfloat16)
    row: dict = {}
    assert gpu_bench.compare(row, [rounded, rounded], [exact, exact]) == "" and 0 < row["differs_off"] < 0.002
    assert "with votes" in gpu_bench.compare(row, [rounded, exact.roll(1, 0)], [exact, exact])
    assert gpu_bench.differs(rounded.fill_(torch.nan), exact) == (float("inf"), True)


def test_cases_grow_and_what_does_not_start_in_time_is_told(tmp_path, monkeypatch):
    sizes = [context * batch * budget for context, batch, budget in gpu_bench.cases()]
    assert sizes == sorted(sizes) and len(sizes) == 36
    result = gpu_bench.Result(tmp_path)
    gpu_bench.decodes(result, ["ours"], time.monotonic() - 1)
    gpu_bench.compressions(result, time.monotonic() - 1)
    assert len(result.data["skipped"]) == 36 + 4 and not result.data["errors"]


def test_a_kernel_that_fails_is_not_tried_again_and_the_others_count(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "Batch", lambda *_: None)

    def measure(_, kernel):
        if kernel == "ours":
            raise RuntimeError("illegal memory access")
        return {"kernel": kernel, "us_off": 1.0, "us_on": 1.0}, [torch.ones(2), torch.ones(2)]

    monkeypatch.setattr(gpu_bench, "measure", measure)
    result = gpu_bench.Result(tmp_path)
    gpu_bench.decodes(result, ["ours", "sglang"], time.monotonic() + 60)
    assert len(result.data["errors"]) == 1 and {row["kernel"] for row in result.data["rows"]} == {"sglang"}


FAKE = f"""#!/usr/bin/env bash
case "$*" in
    *cuda.is_available*) echo /lib/libcuda.so.1 ;;
    *sys.executable*) echo "$0" ;;
    *gpu_report*) exec {sys.executable} "$@" ;;
    *test_cuda_graph*) exit 5 ;;
    *gpu_modules*) echo "FlashInfer is not installed"; exit 77 ;;
    *test_merge_triton*) echo "$*"; exit $MERGE ;;
    *test_score_triton*) echo $$ >>$PIDS; exec sleep $SLEEP ;;
    *) echo "$*" ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Starts the script with a Python that pretends."""
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    base = {**os.environ, "PYTHON": str(fake), "PIDS": str(tmp_path / "pids"), "KEEPKV_CACHE": str(tmp_path / "cache")}

    def start(merge=0, sleep=0.1):
        command = ["bash", str(REPO / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
        environment = {**base, "MERGE": str(merge), "SLEEP": str(sleep)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.mark.parametrize("merge", [0, 1])
def test_the_script_ends_with_1_when_a_step_failed_and_packs_its_logs(merge, script, tmp_path):
    running = script(merge)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == merge, output
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["logs.tar.gz", "report.json", "report.md"]
    steps = json.loads((out / "report.json").read_text())["steps"]
    assert os.readlink(tmp_path / "cache" / "libcuda" / "libcuda.so") == "/lib/libcuda.so.1"
    assert steps["graphs"]["exit"] == "skipped" and steps["triton_merge"]["exit"] == str(merge)
    assert steps["flashinfer_build"]["exit"] == "skipped" and steps["flashinfer"]["exit"] == "0"
    assert steps["flashinfer_build"]["remark"] == "FlashInfer is not installed"
    with tarfile.open(out / "logs.tar.gz") as packed:
        assert {"logs/bench.log", "logs/triton_score.log", "logs/steps.txt"} <= set(packed.getnames())


def test_the_script_stopped_from_outside_reports_and_ends_what_it_started(script, tmp_path):
    running = script(sleep=1000)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 1, output
    assert "stopped from outside" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pids").read_text()), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = ["bash", str(REPO / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not (tmp_path / "out").exists()
