"""The layout that lets kernels/ and radix/ live at the top without shadowing anybody (STYLE: packaging)."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from keepkv_sglang.tools.places import REPO

LINKED = ("kernels", "radix")


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("name", LINKED)
def test_top_level_folders_are_no_packages_and_are_linked(name: str) -> None:
    assert (REPO / name).is_dir()
    assert not (REPO / name / "__init__.py").exists()
    link = REPO / "keepkv_sglang" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("start", ["-c", "-m pytest"])
def test_a_checkout_does_not_shadow_hugging_faces_kernels(start: str, tmp_path: Path) -> None:
    if start == "-c":
        where = _run(sys.executable, "-c", "import kernels; print(kernels.__file__)", cwd=REPO)
    else:  # pytest puts the checkout on the path in its own ways
        probe = tmp_path / "test_probe.py"
        probe.write_text("def test():\n import kernels\n print('AT', kernels.__file__)\n")
        command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-sq", str(probe)]
        where = next(line for line in _run(*command, cwd=REPO).splitlines() if "AT " in line)
    assert "site-packages" in where
    assert str(REPO / "kernels") not in where


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist, as for a release; from a copy: no build/ in the checkout."""
    copy = tmp_path_factory.mktemp("build") / "repo"
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests", "benchmarks")
    shutil.copytree(REPO, copy, symlinks=True, ignore=skip)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=copy)
    (path,) = (copy / "dist").glob("*.whl")
    return path


def shipped(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so"


def test_the_wheel_holds_everything_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith("entry_points.txt"))
        points = configparser.ConfigParser()
        points.read_string(archive.read(info).decode())
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"keepkv_sglang"}
    ours = {str(file.relative_to(REPO)) for file in (REPO / "keepkv_sglang").rglob("*") if shipped(file)}
    ours |= {
        f"keepkv_sglang/{file.relative_to(REPO)}" for f in LINKED for file in (REPO / f).rglob("*") if shipped(file)
    }
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert {Path(name).suffix for name in ours} == {".py", ".cpp", ".h", ".json", ".md", ".html", ".css", ".js"}
    assert points["sglang.srt.plugins"]["keepkv"] == "keepkv_sglang.plugin:register"
    assert points["sglang.srt.platforms"]["keepkv_cpu"] == "keepkv_sglang.start.platform:activate"
    assert points["console_scripts"]["keepkv"] == "keepkv_sglang.cli:main"


def test_the_installed_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    code = """
import keepkv_sglang.kernels.attention as attention, keepkv_sglang.radix.tree as tree, keepkv_sglang.cli
print(attention.__file__, tree.__file__)
"""
    found = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert all(path.startswith(str(target)) for path in found)


def test_importing_the_package_has_no_side_effect() -> None:
    code = "import sys, keepkv_sglang; assert not {'torch', 'sglang', 'transformers'} & set(sys.modules)"
    _run(sys.executable, "-c", code, cwd=REPO)


def test_sglang_is_pinned_exactly() -> None:
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert "sglang==0.5.23" in project["dependencies"]
