"""What ptxas says of the FlashInfer kernels, kept in flashinfer_table.json: registers and spilled bytes per kernel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("flashinfer_table.json")

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


def parse(output: str) -> dict[str, list[int]]:
    """{demangled kernel: [registers, spill stores, spill loads]} from the output of `ptxas -v`.

    RuntimeError when nothing was compiled, or a kernel has no line of resources: then the format has changed.
    """
    found: dict[str, list[int]] = {}
    entry, spills = "", [0, 0]
    for line in output.splitlines():
        if match := _ENTRY.search(line):
            entry, spills = match.group(1), [0, 0]
        elif entry and (match := _SPILL.search(line)):
            spills = [int(match.group(1)), int(match.group(2))]
        elif entry and (match := _USED.search(line)):
            found[entry] = [int(match.group(1)), *spills]
            entry = ""
    if not found or entry:
        raise RuntimeError(f"no kernels in the compiler's output: {output[-500:]}")
    names = _demangle(list(found))
    assert len(set(names)) == len(names), "two kernels of one name would hide each other in the table"
    return dict(zip(names, found.values(), strict=True))


def _demangle(names: list[str]) -> list[str]:
    """Short readable names: without parameters, namespaces and casts. RuntimeError without binutils' c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        raise RuntimeError("c++filt is not installed: apt-get install binutils")
    lines = subprocess.run([tool, "-p", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    drop = re.compile(r"^void |\b(?:flashinfer|cutlass|cute)::|\((?:\w+::)*\w+\)(?=-?\d)|(?<=\d)u\b")
    return [drop.sub("", line).strip() for line in lines]


def compare(old: dict[str, list[int]], new: dict[str, list[int]]) -> list[str]:
    """Regressions in words: more registers, more spilled bytes, a kernel that is gone or was never recorded."""
    worse = [f"{name}: not in the build" for name in old.keys() - new.keys()]
    worse += [f"{name}: not in the table" for name in new.keys() - old.keys()]
    labels = ("registers", "bytes of spill stores", "bytes of spill loads")
    for name in old.keys() & new.keys():
        pairs = zip(labels, old[name], new[name], strict=True)
        worse += [f"{name}: {label} {was} -> {now}" for label, was, now in pairs if now > was]
    return sorted(worse)


def load() -> dict[str, Any]:
    """{"versions": {name: version}, "jobs": {job: {"module", "kernels": {kernel: [registers, stores, loads]}}}}."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"versions": {}, "jobs": {}}


def save(table: dict[str, Any]) -> None:
    TABLE.write_text(render(table))


def render(table: dict[str, Any]) -> str:
    """The table as JSON with one line per kernel: a regression is one line of a diff."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n"


def summary(table: dict[str, Any]) -> str:
    """The table in Markdown, a row per job: what kernels/attention/README.md shows."""
    lines = [
        "| module, object, architecture | kernels | registers, at most | spill stores, at most |",
        "|---|---|---|---|",
    ]
    for name, built in table["jobs"].items():
        used = list(built["kernels"].values())
        lines.append(f"| {name} | {len(used)} | {max(u[0] for u in used)} | {max(u[1] for u in used)} B |")
    return "\n".join(lines)
