"""`python -m tests.soak --seed S --seconds N --shape NAME`: prints what was done and found; exit status 1 if something
was wrong."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.soak.run import soak
from tests.soak.shapes import SHAPES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=900, help="of load; the start and the quiet moments come on top"
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--mutant", default="", help="plant this fault (inject/mutants.py): the soak must fail")
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    options = parser.parse_args()
    model = Path(subprocess.run(
        [sys.executable, "-m", "keepkv_sglang.cli", "model"], check=True, capture_output=True, text=True
    ).stdout.strip().splitlines()[-1])  # fmt: skip
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    failed = False
    for shape in options.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            report = soak(
                shape, options.seed, options.seconds, model, Path(folder), mutant=options.mutant, log=options.log
            )
        print(report.text, flush=True)
        failed |= bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
