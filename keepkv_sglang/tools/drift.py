"""`keepkv check --sglang VERSION`: which names that KeepKV attaches to are different in another SGLang.

That SGLang is installed without its dependencies into a folder that is removed afterwards. A process of its own imports
it in place of the installed one, beside the dependencies that are here, and compares every row of start/seams.py.
What a moved name means is said in docs/seams.md, which a checkout has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from keepkv_sglang.start import seams
from keepkv_sglang.start.seams import SeamResult
from keepkv_sglang.tools.places import REPO

PAGE = REPO / "docs" / "seams.md"
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!]*")
_REPORT = "KEEPKV-DRIFT "  # SGLang's imports print lines of their own


def run(version: str) -> int:
    """Prints the rows that moved. Returns 0 where all match, else 1. ValueError where that version cannot be had."""
    if not _VERSION.fullmatch(version):
        raise ValueError(f"--sglang {version!r} is no version; use one such as {seams.TESTED_SGLANG}")
    with tempfile.TemporaryDirectory(prefix="keepkv-sglang-") as folder:
        print(f"installing sglang=={version} without dependencies into {folder}")
        install(version, folder)
        results = compare(folder)
    moved = [result for result in results if not result.ok]
    meanings = meanings_of(PAGE.read_text()) if PAGE.is_file() else {}
    for result in moved:
        print(f"\nBAD {result.name}: {result.reason}")
        if (meaning := meaning_of(result.name, meanings)) is not None:
            print(f"    if nobody checked: {meaning}")
    print(f"\nsglang {version}: {len(results) - len(moved)} of {len(results)} names are as in {seams.TESTED_SGLANG}")
    if not moved:
        print("A function that keeps its signature and does something else passes: run make test with it")
    return 1 if moved else 0


def install(version: str, folder: str) -> None:
    """sglang of that version alone, in `folder`. ValueError with pip's last line."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", folder, f"sglang=={version}"], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ValueError(f"sglang=={version} cannot be installed: {lines[-1]}")


def compare(folder: str) -> list[SeamResult]:
    """The rows of seams.py against the `sglang` in `folder`, without the row about its version."""
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "SGLANG_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-m", __name__], env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_REPORT)]
    if not lines:
        raise ValueError(f"it could not be read: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    found = json.loads(lines[-1].removeprefix(_REPORT))
    if not Path(found["where"]).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"Python imports sglang from {found['where']} instead; run it outside of a checkout of SGLang")
    return [SeamResult(*row) for row in found["rows"]]


def meanings_of(page: str) -> dict[str, str]:
    """Name as docs/seams.md writes it -> the last column of its row; of one that says "the same", of the row above."""
    found, meaning = {}, ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) >= 3:
            meaning = meaning if cells[-1].endswith("the same") else cells[-1]
            found.update(dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), meaning))
    return found


def meaning_of(name: str, meanings: dict[str, str]) -> str | None:
    """Of a result's name: "after managers.scheduler.Scheduler.on_idle" has a row as `Scheduler.on_idle`, or by its last
    part alone."""
    parts = name.rsplit(" ", 1)[-1].split(".")
    return next((meanings[key] for key in (".".join(parts[-2:]), parts[-1]) if key in meanings), None)


def _report() -> None:
    import sglang  # another one than this file's other functions run with

    rows = [seams.check(seam) for seam in (*seams.HOOKS, *seams.MEASURING, *seams.USES)]
    where = os.path.realpath(os.path.dirname(sglang.__file__))
    print(_REPORT + json.dumps({"where": where, "rows": [[row.name, row.ok, row.reason] for row in rows]}))


if __name__ == "__main__":
    _report()
