"""scripts/gpu_check.sh and what it writes, as far as that needs no GPU: steps that fail, are cut or are missing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types

import pytest
import torch

from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import modules as gpu_modules
from benchmarks.gpu import report as gpu_report
from keepkv_sglang.kernels.attention import reference
from keepkv_sglang.tools.places import REPO
from tests.tools.unpadded import unpadded

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
TRITON = ("attention", "merge", "score", "layer", "codec")
ROW = {
    "kernel": "ours", "context": 2048, "batch": 1, "budget": 0.1, "slots": 205, "us_off": 10.0, "us_on": 11.0,
    "votes_cost": 0.1, "gb_per_s": 76.0, "graph": False, "in_l2": True, "differs_off": 0.0, "differs_on": 0.001,
    "differs_float32": 0.002, "eager_because": "votes on: not captured: RuntimeError: z",
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
    measured |= {"skipped": ["x: out of time"]}
    (folder / "bench.json").write_text(json.dumps(measured))
    report = gpu_report.report(folder)
    text = unpadded(report)
    for part in (
        "| triton | 1 | 20 | 2 run, 1 failed, 1 skipped |", "test_two: assert 1 == 2\n", "1 of triton: no SGLang",
        "no compute-sanitizer", "| 76% | 0.0000, 0.0010, 0.0020 | L2 eager |", "ERROR: sglang: RuntimeError: y",
        "skipped: x: out of time", "eager, 1 rows: ours: votes on: not captured",
        "torch ", "driver",
    ):  # fmt: skip
        assert part in text, part
    whole = json.loads((folder / "report.json").read_text())
    assert whole["bench"] == measured and whole["steps"]["triton"]["exit"] == "1"
    assert (folder / "report.md").read_text() == report and not list(folder.glob("*.part"))


def test_a_report_of_turns(folder):
    row = {
        "case": "turn",
        "context": 0,
        "tokens": 500,
        "kernel": "triton",
        "mib": 1024,
        "first_s": 2.0,
        "peak_mib": 9.4,
    }
    more = {"s": 0.02, "parts_ms": {"all": 6.72, "sums_kernel": 1.0}, "syncs": 0, "operations": 1279}
    measured = {"turns": [row | more, row | {"tokens": 900}], "errors": ["y"], "skipped": ["z: out of time"]}
    measured["prefill"] = [{"before": 0, "new": 8, "us_off": 100.0, "us_on": 134.0, "us_sdpa": 50.0}]
    (folder / "turns.json").write_text(json.dumps(measured))
    text = unpadded(gpu_report.report(folder))
    for part in (
        "| turn | 0 | 500 | triton | 1024 | 20.0 | 2000.0 | 6.7 | 0 | 1279 | 9 |", "| 0 | 8 | 100 | 134 | +34% | 50 |",
        "| turn | 0 | 900 | triton | 1024 | - | 2000.0 | - | - | - | 9 |", "ERROR: y", "skipped: z: out of time",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("xml", [None, XML[:300]])
def test_a_step_that_was_cut_is_told_by_its_log(xml, folder):
    steps(folder, ("triton", "124", "240", "out of time"))
    (folder / "logs" / "triton.log").write_text(LOG)
    if xml:
        (folder / "logs" / "triton.xml").write_text(xml)
    (folder / "bench.json").write_text('{"rows": [{"kernel"')
    text = unpadded(gpu_report.report(folder))
    assert "| triton | 124 | 240 | 2 run, 1 failed, 1 skipped | out of time |" in text
    assert "FAILED tests/kernels/test_a_triton.py::test_two" in text
    assert "triton was cut in tests/kernels/test_a_triton.py::test_four[x-y]" in text
    assert "No readable bench.json" in text


def test_nothing_at_all_and_a_crash_without_tests(folder):
    assert "No readable bench.json" in gpu_report.report(folder)
    steps(folder, ("small", "139", "3", ""))
    (folder / "logs" / "small.log").write_text("one\nSegmentation fault\n")
    assert "small ended with 139" in gpu_report.report(folder) and "Segmentation fault" in gpu_report.report(folder)


def test_only_what_is_missing_or_too_large_is_a_skip(tmp_path, monkeypatch):
    result = gpu_bench.Result(tmp_path)
    monkeypatch.setattr(gpu_cases.importlib.util, "find_spec", lambda name: None if name == "flashinfer" else name)
    result.note("a", ModuleNotFoundError("no flashinfer", name="flashinfer.jit"))
    result.note("b", torch.OutOfMemoryError("8 GiB"))
    result.note("c", RuntimeError("illegal memory access"))
    result.note("d", ModuleNotFoundError("a part of SGLang that moved", name="sglang.kernels"))
    result.note("e", ModuleNotFoundError("something that FlashInfer needs", name="tvm_ffi"))
    result.note("f", ImportError("cannot import name", name="flashinfer"))
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [text[0] for text in written["skipped"]] == ["a", "b"]
    assert [text[0] for text in written["errors"]] == ["c", "d", "e", "f"]
    assert written["errors"][0] == "c: RuntimeError: illegal memory access"


def test_outputs_are_compared():
    gen = torch.Generator().manual_seed(0)
    exact = torch.randn(8, 32, 128, generator=gen) / 10
    rounded = exact.to(torch.bfloat16)
    row: dict = {}
    ends = [exact[[0, -1]]] * 2
    assert gpu_bench.compare(row, [rounded, rounded], [exact, exact], ends) == "" and 0 < row["differs_off"] < 0.002
    assert 0 < row["differs_float32"] < 0.002
    other = exact.roll(1, 0)
    wrong = gpu_bench.compare(row, [rounded, other], [exact, exact], ends)
    assert wrong.startswith("votes on: off by") and "votes on, from float32: off by" in wrong
    # alone: nothing but float32 tells
    assert gpu_bench.compare(row, [other, rounded], [other, rounded], ends).startswith("votes off, from float32: off")
    assert row["differs_off"] == 0 and row["differs_float32"] > 0.1
    assert gpu_bench.differs(rounded.fill_(torch.nan), exact) == (float("inf"), True)


def test_float32_is_equation_6():
    torch.manual_seed(0)
    case = gpu_cases.Batch(3, 70, "cpu")
    for votes, got in zip((False, True), gpu_bench.exact(case), strict=True):
        log_votes = case.votes.double() if votes else torch.zeros(210, gpu_cases.HEADS_KV, dtype=torch.float64)
        wanted = case.q.double()
        pools = (case.k.double(), case.v.double(), log_votes, case.table, case.rows, case.lens)
        reference.decode(case.q.double(), *pools, case.scale, wanted)
        assert (got - wanted[[0, -1]]).abs().max() < 1e-5
        torch.testing.assert_close(case.exact(1, votes, chunk=16), case.exact(1, votes))


class FakeGraphs:
    """torch.cuda's graphs on the CPU: what is captured runs once more at the replay. fails: a capture that raises."""

    def __init__(self, monkeypatch, *, fails=False):
        self.fails, self.recorded = fails, 0
        for name in ("graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def CUDAGraph(self):
        return self

    @contextlib.contextmanager
    def graph(self, graph):
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        self.after()


def test_a_replay_that_computes_something_else_is_an_error_and_a_failed_capture_is_told(monkeypatch):
    out, count = torch.ones(4), []
    graphs = FakeGraphs(monkeypatch)
    graphs.after = lambda: out.fill_(1)
    replay = gpu_bench.captured(lambda: count.append(1), out)
    assert replay == (graphs.replay, "", False) and len(count) == gpu_bench.CALLS
    graphs.after = lambda: None  # the kernel is not in the graph: `out` stays NaN
    assert gpu_bench.captured(lambda: None, out.fill_(1)) == (None, "the replay is off by inf", True)
    graphs.after = lambda: out.fill_(1.1)
    assert gpu_bench.captured(lambda: None, out.fill_(1)).wrong
    graphs = FakeGraphs(monkeypatch, fails=True)
    call, why, wrong = gpu_bench.captured(lambda: None, out.fill_(1))
    assert call is None and why.startswith("not captured: RuntimeError: operation") and not wrong


@pytest.mark.parametrize("missing", [(), (0,), (1,), (0, 1)])
def test_a_row_is_timed_with_graphs_or_without_never_both(missing, monkeypatch):
    replays = [gpu_bench.Replay(None, "not captured: x") if i in missing else gpu_bench.Replay(print) for i in (0, 1)]
    timed = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_bench, "captured", lambda *_: replays.pop(0))
    monkeypatch.setattr(gpu_bench, "seconds", lambda function, per=1: timed.append((function is print, per)) or 1.0)
    case = types.SimpleNamespace(out=torch.zeros(2), call=lambda *_: lambda: None)
    row, _, stale = gpu_bench.measure(case, "ours")
    assert timed == ([(False, 1)] * 2 if missing else [(True, gpu_bench.CALLS)] * 2)
    assert row["graph"] == (not missing) and not stale
    assert row.get("eager_because", "").count("not captured") == len(missing)


def test_a_stale_replay_is_an_error_and_its_row_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "Batch", lambda *_: None)
    monkeypatch.setattr(gpu_bench, "exact", lambda _: [torch.ones(2)] * 2)
    monkeypatch.setattr(gpu_bench, "cases", lambda: [(2048, 1, 0.1)])
    row = {"us_off": 1.0, "us_on": 1.0, "graph": False}
    monkeypatch.setattr(gpu_bench, "measure", lambda *_: (row, [torch.ones(3)] * 2, ["the replay is off by inf"]))
    result = gpu_bench.Result(tmp_path)
    gpu_bench.decodes(result, ["ours"], time.monotonic() + 60)
    assert result.data["errors"] == ["ours, 2048 x 1 at 0.1: AssertionError: the replay is off by inf"]
    assert len(result.data["rows"]) == 1 and result.data["rows"][0]["in_l2"]


def test_modules_fail_one_by_one_and_only_the_benchmarks_decide_whether_it_may_run(tmp_path, capsys):
    def spec(name, error=None):
        def build(**_):
            if error:
                raise error

        return types.SimpleNamespace(name=name, is_aot=False, build=build)

    ready, bad = tmp_path / "ready", spec("b", RuntimeError("nvcc"))
    assert gpu_modules.build_all([spec("a"), bad], [spec("c")], ready) == 1 and not ready.exists()
    assert gpu_modules.build_all([spec("a")], [bad, spec("c")], ready) == 1 and ready.exists()
    told = capsys.readouterr().out
    assert told.count("b: RuntimeError: nvcc") == 2 and told.count("c: built") == 2
    assert gpu_modules.build_all([spec("a")], [spec("c")], None) == 0


def test_cases_grow_and_what_does_not_start_in_time_is_told(tmp_path, monkeypatch):
    sizes = [context * batch * budget for context, batch, budget in gpu_bench.cases()]
    assert sizes == sorted(sizes) and len(sizes) == 36
    result = gpu_bench.Result(tmp_path)
    gpu_bench.decodes(result, ["ours"], time.monotonic() - 1)
    assert len(result.data["skipped"]) == 36 and not result.data["errors"]


def test_a_kernel_that_fails_is_not_tried_again_and_the_others_count(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "Batch", lambda *_: None)
    monkeypatch.setattr(gpu_bench, "exact", lambda _: [torch.ones(2)] * 2)

    def measure(_, kernel):
        if kernel == "ours":
            raise RuntimeError("illegal memory access")
        return {"kernel": kernel, "us_off": 1.0, "us_on": 1.0}, [torch.ones(2), torch.ones(2)], []

    monkeypatch.setattr(gpu_bench, "measure", measure)
    result = gpu_bench.Result(tmp_path)
    gpu_bench.decodes(result, ["ours", "sglang"], time.monotonic() + 60)
    assert len(result.data["errors"]) == 1 and {row["kernel"] for row in result.data["rows"]} == {"sglang"}


FAKE = f"""#!/usr/bin/env bash
case "$*" in
    *cuda.is_available*) echo /lib/libcuda.so.1 ;;
    *sys.executable*) echo "$0" ;;
    *gpu.report*) exec {sys.executable} "$@" ;;
    *test_backend_triton*) exit 5 ;;
    *test_cuda_graph*) exit $GRAPHS ;;
    *gpu.bench*--small*) exit $SMALL ;;
    *gpu.modules*) echo "FlashInfer is not installed"; exit $MODULES ;;
    *cuda_home*) echo /fake/cuda ;;
    *gpu.bench*) echo "$*" ;;
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

    def start(sleep=0.1, mode=None, **exits):
        command = ["bash", str(REPO / "scripts" / "gpu_check.sh"), *([mode] if mode else []), str(tmp_path / "out")]
        exits = {"MERGE": 0, "GRAPHS": 0, "SMALL": 0, "MODULES": 77, **exits}
        environment = {**base, "SLEEP": str(sleep), **{name: str(code) for name, code in exits.items()}}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.mark.parametrize("merge", [0, 1])
def test_the_script_ends_with_1_when_a_step_failed_and_packs_its_logs(merge, script, tmp_path):
    running = script(MERGE=merge)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == merge, output
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["logs.tar.gz", "report.json", "report.md"]
    steps = json.loads((out / "report.json").read_text())["steps"]
    assert os.readlink(tmp_path / "cache" / "libcuda" / "libcuda.so") == "/lib/libcuda.so.1"
    assert steps["sglang_backend"]["exit"] == "skipped" and steps["triton_merge"]["exit"] == str(merge)
    assert steps["flashinfer_build"]["exit"] == "skipped" and steps["flashinfer"]["exit"] == "0"
    assert steps["flashinfer_build"]["remark"] == "FlashInfer is not installed"
    with tarfile.open(out / "logs.tar.gz") as packed:
        assert {"logs/bench.log", "logs/triton_score.log", "logs/steps.txt"} <= set(packed.getnames())


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        (
            "A",
            {f"triton_{name}" for name in TRITON}
            | {"triton_packed_span", "sglang_score_mod", "sglang_packed", "graphs"},
        ),
        ("B", {"codec", "packed", "bench", "turns"}),
        ("C", {"flashinfer_build", "flashinfer", "small", "sanitizer"}),
    ],
)
def test_a_mode_runs_its_own_steps(mode, wanted, script, tmp_path):
    running = script(mode=mode)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output
    assert set(json.loads((tmp_path / "out" / "report.json").read_text())["steps"]) == wanted


def test_what_is_skipped_cut_or_lost_is_told(script, tmp_path):
    """A file of ours none of whose tests ran; a build that was cut; a sanitizer that was never reached."""
    running = script(GRAPHS=5, SMALL=3, MODULES=137)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 1, output
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert (steps["graphs"]["exit"], steps["graphs"]["remark"]) == ("5", "no test ran")
    assert (steps["sanitizer"]["exit"], steps["sanitizer"]["remark"]) == ("1", "not run: small failed")
    assert (steps["flashinfer"]["exit"], steps["flashinfer"]["remark"]) == ("1", "not run: the build was cut")
    assert steps["sglang_backend"]["exit"] == "skipped" and steps["small"]["exit"] == "3"


def test_a_module_that_fails_leaves_the_tests_of_the_others(script, tmp_path):
    running = script(MODULES=1)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 1, output
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert steps["flashinfer_build"]["exit"] == "1" and steps["flashinfer"]["exit"] == "0"


def test_the_script_stopped_from_outside_reports_and_ends_what_it_started(script, tmp_path):
    running = script(sleep=1000)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 1, output
    report = unpadded((tmp_path / "out" / "report.md").read_text())
    assert "stopped from outside" in report and "| bench | no status | 0 | | never ended |" in report
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pids").read_text()), 0)


SLOW = """
import time
def test_one(): assert 1 == 2, "one is not two"
def test_two(): time.sleep({})
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_a_step_that_is_cut_keeps_the_reasons(hangs, tmp_path):
    """As the script starts it: in the background, where bash ignores SIGINT. A kernel that hangs ignores it as well."""
    body = SLOW.format(60)
    if hangs:
        body = body.replace("time.sleep", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep")
    (tmp_path / "test_slow.py").write_text(body)
    pytest_ = f"{sys.executable} -m pytest -p benchmarks.gpu.pytest_plugin -v --junit-xml a.xml -p no:cacheprovider"
    command = f"trap '' INT; timeout -s INT -k 2 8 {pytest_} test_slow.py >a.log 2>&1 & wait $!"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, timeout=60
    )
    log = (tmp_path / "a.log").read_text()
    assert done.returncode == (137 if hangs else 124) and (tmp_path / "a.xml").exists() != hangs, log
    tests = gpu_report.tests_of(tmp_path / "a.xml", tmp_path / "a.log")
    assert tests["run"] == 1 and tests["running"] == "test_slow.py::test_two", log
    ((name, why),) = tests["failed"].items()
    assert name.endswith("::test_one") and "one is not two" in why, log


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = ["bash", str(REPO / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not (tmp_path / "out").exists()
