"""report.md and report.json from what the steps of scripts/gpu_check.sh left, cut or whole.

    python -m benchmarks.gpu.report FOLDER

FOLDER/logs holds steps.txt, a line "name<TAB>exit status<TAB>seconds<TAB>remark" per step, and per step NAME.log and
for pytest NAME.xml; FOLDER/bench.json is bench.py's. Any of them may be missing or cut: a step that ran out of time
was killed. Needs tabulate; no torch, no GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.origin import commit
from keepkv_sglang.tools.report import tables

PACKAGES = ("torch", "triton", "sglang", "flashinfer-python", "pytest")
KILLED = {"124", "137"}  # what timeout exits with
FINE = {"0", "skipped"}
# A line of pytest -v; the outcome is missing while a test runs. Names may hold spaces: "[(3, 3)-80]".
TEST_LINE = re.compile(r"^(?P<name>\S+\.py::.*?)(?: (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b.*)?$")
REASON = "REASON"  # pytest_plugin.py: a line "REASON<TAB>test<TAB>first line" as soon as a test has failed
TAIL_LINES = 8


def write(path: Path, text: str) -> None:
    """Beside, then moved: whoever reads it, or ends this process, finds a whole file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """None when the file is missing or is not JSON."""
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def tests_of(xml: Path, log: Path) -> dict[str, Any] | None:
    """{"run", "failed": {test: first line}, "skipped": {reason: count}, "running": a test that was cut, or ""} of a
    pytest step: from its XML, which pytest writes at its end, otherwise from the lines of its -v log, which alone tells
    what was running. None for a step without tests."""
    log_tests = _from_log(read_text(log))
    try:
        # A test that SIGINT ended is there without its name.
        cases = [case for case in ET.parse(xml).getroot().iter("testcase") if case.get("name")]
    except (OSError, ET.ParseError):
        return log_tests
    failed, skipped = {}, Counter()
    for case in cases:
        name = f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}".removeprefix("::")
        for kind in ("failure", "error"):
            for found in case.iter(kind):
                failed[name] = first_line(found.get("message") or found.text)
        for found in case.iter("skipped"):
            skipped[first_line(found.get("message") or found.text)] += 1
    running = log_tests["running"] if log_tests else ""
    return {"run": len(cases) - sum(skipped.values()), "failed": failed, "skipped": dict(skipped), "running": running}


def _from_log(log: str) -> dict[str, Any] | None:
    lines = [match for line in log.splitlines() if (match := TEST_LINE.match(line))]
    if not lines:
        return None
    outcomes = [line["outcome"] for line in lines]
    told = dict(line.split("\t", 2)[1:] for line in log.splitlines() if re.match(f"{REASON}\t.*\t", line))
    cut = "no message: the step was cut"
    failed = {m["name"]: told.get(m["name"], cut) for m in lines if m["outcome"] in ("FAILED", "ERROR")}
    skipped = {"no reason: the step was cut": count} if (count := outcomes.count("SKIPPED")) else {}
    running = lines[-1]["name"].strip() if outcomes[-1] is None else ""
    return {"run": sum(o not in (None, "SKIPPED") for o in outcomes), "failed": failed, "skipped": skipped,
            "running": running}  # fmt: skip


def first_line(text: str | None) -> str:
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")[:300]


def steps_of(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"exit", "seconds", "remark", "tests", "tail"}}, tail: the last lines of a log whose step failed."""
    steps = {}
    for line in read_text(folder / "steps.txt").splitlines():
        name, code, seconds, remark = [*line.split("\t"), "", "", ""][:4]
        log = folder / f"{name}.log"
        tail = [] if code in FINE else [part[:300] for part in read_text(log).splitlines()[-TAIL_LINES:]]
        tests = tests_of(folder / f"{name}.xml", log)
        steps[name] = {"exit": code, "seconds": seconds, "remark": remark, "tests": tests, "tail": tail}
    return steps


def versions() -> dict[str, str]:
    """Packages, GPU and driver."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found["gpu, driver, memory"] = first_line(subprocess.check_output(command, text=True, timeout=10))
    except (OSError, subprocess.SubprocessError):
        found["gpu, driver, memory"] = "nvidia-smi failed"
    return found


def step_lines(steps: dict[str, dict[str, Any]]) -> list[str]:
    rows, details = [], []
    for name, step in steps.items():
        tests, code = step["tests"], step["exit"]
        counted = ""
        if tests:
            counted = f"{tests['run']} run, {len(tests['failed'])} failed, {sum(tests['skipped'].values())} skipped"
            details += [f"- FAILED {test}: {why}" for test, why in tests["failed"].items()]
            details += [f"- skipped {count} of {name}: {why}" for why, count in tests["skipped"].items()]
            details += [f"- {name} was cut in {tests['running']}"] if tests["running"] else []
        if not (tests and tests["failed"]) and step["tail"]:
            details += [f"- {name} ended with {code}:", "", "```", *step["tail"], "```"]
        remark = step["remark"] or ("out of time" if code in KILLED else "")
        rows.append((name, code, step["seconds"], counted, remark))
    return [tables.markdown(("step", "exit", "s", "tests", "remark"), rows, text=range(5)), "", *details]


def bench_lines(measured: dict[str, Any]) -> list[str]:
    ceiling = measured.get("copy_gb_per_s") or float("nan")
    lines = [f"{measured.get('device')}; copy {ceiling:.0f} GB/s."]
    lines += [
        "Differs: largest difference of the outputs, votes off and on, from the case's first kernel, and from float32."
        f" L2: K and V are less than three times that cache ({measured.get('l2_bytes', 0) / 1e6:.0f} MB), so GB/s is"
        " not memory's alone. eager: not a CUDA graph, so Python's launches count.",
        "",
    ]
    columns = (
        "kernel", "context", "batch", "budget", "us, votes off", "on", "votes cost", "GB/s", "of copy", "differs", "",
    )  # fmt: skip
    rows = []
    for row in measured.get("rows", []):
        marks = [mark for mark, on in (("L2", row["in_l2"]), ("eager", not row["graph"])) if on]
        differs = ", ".join(f"{row[key]:.4f}" for key in ("differs_off", "differs_on", "differs_float32"))
        rows.append(
            (*(row[key] for key in ("kernel", "context", "batch", "budget")), f"{row['us_off']:.1f}",
             f"{row['us_on']:.1f}", f"{row['votes_cost']:+.1%}", f"{row['gb_per_s']:.0f}",
             f"{row['gb_per_s'] / ceiling:.0%}", differs, " ".join(marks))
        )  # fmt: skip
    lines += [tables.markdown(columns, rows), ""]
    why = Counter(
        f"{row['kernel']}: {row.get('eager_because', '')}" for row in measured.get("rows", []) if not row["graph"]
    )
    lines += ["", *(f"- eager, {count} rows: {text}" for text, count in why.items())]
    lines += ["", *(f"- ERROR: {text}" for text in measured.get("errors", []))]
    return lines + [f"- skipped: {text}" for text in measured.get("skipped", [])]


def turns_lines(measured: dict[str, Any]) -> list[str]:
    """Of turns.json (turns.py)."""
    columns = (
        "compression", "context", "tokens", "kernels", "scratch, MiB", "ms", "first, ms", "GPU busy, ms", "waits",
        "operations", "peak, MiB",
    )  # fmt: skip
    rows = [
        (*(row[key] for key in ("case", "context", "tokens", "kernel", "mib")), _ms(row.get("s")), _ms(row["first_s"]),
         f"{row['parts_ms']['all']:.1f}" if row.get("parts_ms") else "-", row.get("syncs", "-"),
         row.get("operations", "-"), f"{row['peak_mib']:.0f}")
        for row in measured.get("turns", [])
    ]  # fmt: skip
    lines = ["One compression of an 8B-shaped model (benchmarks/gpu/turns.py):", "", tables.markdown(columns, rows), ""]
    columns = "prefill: slots before", "new", "SGLang's extend, us a layer", "with votes", "votes cost", "torch SDPA"
    rows = [
        (row["before"], row["new"], f"{row['us_off']:.0f}", f"{row['us_on']:.0f}",
         f"{row['us_on'] / row['us_off'] - 1:+.0%}", f"{row['us_sdpa']:.0f}")
        for row in measured.get("prefill", [])
    ]  # fmt: skip
    lines += [tables.markdown(columns, rows), "", *(f"- ERROR: {text}" for text in measured.get("errors", []))]
    return lines + [f"- skipped: {text}" for text in measured.get("skipped", [])]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def report(folder: Path) -> str:
    """Writes both files and returns report.md."""
    steps, measured = steps_of(folder / "logs"), read_json(folder / "bench.json")
    turns = read_json(folder / "turns.json")
    whole = {"commit": commit(), "versions": versions(), "steps": steps, "bench": measured, "turns": turns}
    lines = [f"# scripts/gpu_check.sh, commit {whole['commit']}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in whole["versions"].items()), ""]
    lines += [*step_lines(steps), "", *(bench_lines(measured) if measured else ["No readable bench.json."])]
    lines += ["", *turns_lines(turns)] if turns else []
    text = "\n".join(lines) + "\n"
    write(folder / "report.json", json.dumps(whole, indent=1))
    write(folder / "report.md", text)
    return text


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
