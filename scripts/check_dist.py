"""Builds sdist and wheel into dist/ and shows that the wheel is complete: installed without the checkout, it passes
`keepkv check`, and a server of it answers a request that `keepkv inspect` makes a page of. `make dist` runs it. A table
at the end says how long each step took.

What the wheel depends on is this Python's environment, not a second one of 11 GB: a line in a .pth file. `make dist
ARGS=--empty` goes the way of somebody who has nothing yet: pip brings all of it, the model is made, kernels compiled.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
REQUEST = """
import subprocess, sys
from keepkv_sglang.tools.server_process import ServerProcess
model, keepkv, prompt = sys.argv[1:]
flags = ["--model-path", model, "--enable-keepkv", "--keepkv-record", "record", "--max-total-tokens", "3000"]
with ServerProcess(flags, say=print, timeout_s=900) as server:  # kernels are compiled where the cache is empty
    subprocess.run([keepkv, "inspect", server.base_url, "--prompt", prompt, "--max-tokens", "8"], check=True)
"""


class Steps:
    """What was done, how long it took, and how large environment and cache (model, compiled kernels) were then."""

    def __init__(self, home: Path) -> None:
        self.venv, self.cache = home / "venv", home / "cache"
        self.rows = [("step", "seconds", "environment, MiB", "cache, MiB")]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.rows.append((name, f"{seconds:.0f}", *(_mebibytes(place) for place in (self.venv, self.cache))))

    def __str__(self) -> str:
        head, *rows = (f"| {' | '.join(row)} |" for row in self.rows)
        return "\n".join([head, "|---|---|---|---|", *rows])


def _mebibytes(folder: Path) -> str:
    """Disk that a folder takes; a dash when there is none."""
    if not folder.exists():
        return "-"
    return subprocess.run(["du", "-sm", folder], check=True, capture_output=True, text=True).stdout.split()[0]


def run(*command: str | Path, cwd: Path, show: bool = True, **env: str) -> str:
    """Runs a command, shows it, and returns what it printed. SystemExit with all of that when it fails."""
    shown = (part.name if isinstance(part, Path) else Path(part.strip().splitlines()[0]).name for part in command)
    print("==", *shown, flush=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\ncheck_dist: exit status {done.returncode}")
    if show:
        print("\n".join(done.stdout.strip().splitlines()[-3:]), flush=True)
    return done.stdout.strip()


def build(version: str) -> Path:
    """The wheel, made from the sdist."""
    shutil.rmtree(REPO / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=REPO, show=False)
    names = sorted(path.name for path in (REPO / "dist").iterdir())
    expected = [f"keepkv_sglang-{version}-py3-none-any.whl", f"keepkv_sglang-{version}.tar.gz"]
    if names != expected:
        raise SystemExit(f"check_dist: dist/ holds {names}, not {expected}")
    return REPO / "dist" / expected[0]


def install(wheel: Path, place: Path, empty: bool) -> Path:
    """The `keepkv` of a fresh environment that has the wheel; everything else is pip's to bring (`empty`), or from this
    environment."""
    venv.create(place, symlinks=True, with_pip=empty)  # keepkv model downloads with the environment's pip
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    if empty:
        run(*pip, f"{wheel}[demo]", cwd=place, show=False)
    else:
        run(*pip, "--no-deps", wheel, cwd=place, show=False)
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place, show=False)
        (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "keepkv"


def use(version: str, home: Path, steps: Steps, empty: bool) -> None:
    """Builds, installs and asks, each a step. SystemExit where one fails."""
    own = {"KEEPKV_CACHE": str(steps.cache)} if empty else {}
    with steps.step("sdist and wheel"):
        wheel = build(version)
    with steps.step("pip install" if empty else "pip install --no-deps"):
        keepkv = install(wheel, steps.venv, empty)
    python = keepkv.with_name("python")
    where = run(python, "-c", "import keepkv_sglang; print(keepkv_sglang.__file__)", cwd=home)
    if not where.startswith(str(home)) or run(keepkv, "version", cwd=home) != version:
        raise SystemExit(f"check_dist: not {version} from the wheel: {where}")
    with steps.step("keepkv check"):
        run(keepkv, "check", cwd=home)
    with steps.step("keepkv model"):
        model = run(keepkv, "model", cwd=home, **own).splitlines()[-1]
    with steps.step("a server, its first request, a page of it"):
        run(python, "-c", REQUEST, model, str(keepkv), str(REPO / "LICENSE"), cwd=home, **own)


def main() -> None:
    """Exit status 0 when all of it worked."""
    parser = argparse.ArgumentParser(description="Build the wheel and use it.")
    parser.add_argument("--empty", action="store_true", help="bring, make and compile everything: 11 GB, minutes")
    empty = parser.parse_args().empty
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    with tempfile.TemporaryDirectory(prefix="keepkv-dist-") as folder:
        steps = Steps(Path(folder))
        try:
            use(version, Path(folder), steps, empty)
        finally:
            print(steps, flush=True)  # of a failure too: what it took until then
    print(f"dist/ is complete: {', '.join(sorted(path.name for path in (REPO / 'dist').iterdir()))}")


if __name__ == "__main__":
    main()
