"""Builds sdist and wheel into dist/ and shows that the wheel is complete: installed without the checkout, it passes
`keepkv check`, and a server of it answers a request that `keepkv inspect` makes a page of. `make dist` runs it.

What the wheel depends on is this Python's environment, not a second one of 11 GB: a line in a .pth file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
REQUEST = """
import subprocess, sys
from keepkv_sglang.tools.server_process import ServerProcess
model, keepkv, prompt = sys.argv[1:]
flags = ["--model-path", model, "--enable-keepkv", "--keepkv-record", "record", "--max-total-tokens", "3000"]
with ServerProcess(flags, say=print) as server:
    subprocess.run([keepkv, "inspect", server.base_url, "--prompt", prompt, "--max-tokens", "8"], check=True)
"""


def run(*command: str | Path, cwd: Path, show: bool = True) -> str:
    """Runs a command, shows it, and returns what it printed. SystemExit with all of that when it fails."""
    shown = (part.name if isinstance(part, Path) else Path(part.strip().splitlines()[0]).name for part in command)
    print("==", *shown, flush=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
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


def install(wheel: Path, place: Path) -> Path:
    """The `keepkv` of a fresh environment that has the wheel, and everything else from this one."""
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=place, show=False)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place, show=False))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "keepkv"


def main() -> None:
    """Exit status 0 when all of it worked."""
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    wheel = build(version)
    with tempfile.TemporaryDirectory(prefix="keepkv-dist-") as folder:
        home = Path(folder)
        keepkv = install(wheel, home / "venv")
        python = keepkv.with_name("python")
        where = run(python, "-c", "import keepkv_sglang; print(keepkv_sglang.__file__)", cwd=home)
        if not where.startswith(str(home)) or run(keepkv, "version", cwd=home) != version:
            raise SystemExit(f"check_dist: not {version} from the wheel: {where}")
        run(keepkv, "check", cwd=home)
        model = run(keepkv, "model", cwd=home).splitlines()[-1]
        run(python, "-c", REQUEST, model, str(keepkv), str(REPO / "LICENSE"), cwd=home)
    print(f"dist/ is complete: {', '.join(sorted(path.name for path in (REPO / 'dist').iterdir()))}")


if __name__ == "__main__":
    main()
