"""The walls between rooms (tool.importlinter in pyproject.toml) stand: each arrow that must not be is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import grimp
import pytest
from importlinter.configuration import configure
from importlinter.contracts.acyclic_siblings import AcyclicSiblingsContract
from importlinter.contracts.forbidden import ForbiddenContract

from keepkv_sglang.tools.places import REPO

CONFIG = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]
FORBIDDEN = [contract for contract in CONFIG["contracts"] if contract["type"] == "forbidden"]
ARROWS = [
    (contract["name"], source, target)
    for contract in FORBIDDEN
    for source in contract["source_modules"]
    for target in contract["forbidden_modules"]
]
DOORS = ("plugin.py", "cli.py", "policy.py", "__init__.py")

configure()


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*CONFIG["root_packages"], include_external_packages=True, cache_dir=None)


def contract_of(name):
    (options,) = [contract for contract in CONFIG["contracts"] if contract["name"] == name]
    kind = {"forbidden": ForbiddenContract, "acyclic_siblings": AcyclicSiblingsContract}[options["type"]]
    plain = {k: v if isinstance(v, list) else str(v) for k, v in options.items() if k not in ("name", "type")}
    session = {"root_packages": CONFIG["root_packages"], "include_external_packages": "True"}
    return kind(name, session, plain)


def test_the_house_keeps_all_of_them(graph):
    for contract in CONFIG["contracts"]:
        assert contract_of(contract["name"]).check(deepcopy(graph), verbose=False).kept, contract["name"]


@pytest.mark.parametrize(("name", "source", "target"), ARROWS, ids=[f"{s} to {t}" for _, s, t in ARROWS])
def test_a_planted_arrow_is_found(graph, name, source, target):
    planted = deepcopy(graph)
    importer = source.replace("*", "tree") if "*" in source else f"{source}.planted"
    planted.add_module(importer)
    planted.add_import(importer=importer, imported=target, line_number=1, line_contents=f"import {target}")
    assert not contract_of(name).check(planted, verbose=False).kept


def test_a_planted_circle_is_found(graph):
    planted = deepcopy(graph)
    planted.add_import(
        importer="keepkv_sglang.runtime.counters", imported="keepkv_sglang.runtime.due", line_number=1, line_contents=""
    )
    assert not contract_of("no circle among modules").check(planted, verbose=False).kept


def test_lint_imports_fails_on_a_file_with_a_forbidden_import(tmp_path):
    """The command that `make lint` runs, on a copy of the package."""
    shutil.copytree(REPO / "keepkv_sglang", tmp_path / "keepkv_sglang", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    (tmp_path / "keepkv_sglang/turn/planted.py").write_text("from keepkv_sglang.runtime import due  # noqa\n")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "keepkv_sglang.turn.planted -> keepkv_sglang.runtime.due" in done.stdout


def test_only_the_doors_stand_loose():
    assert sorted(path.name for path in (REPO / "keepkv_sglang").glob("*.py")) == sorted(DOORS)


def test_no_file_is_longer_than_400_lines():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=REPO, capture_output=True, text=True).stdout.split()
    files = files or [str(path.relative_to(REPO)) for path in REPO.glob("*/**/*.py") if ".venv" not in path.parts]
    too_long = [file for file in files if len((REPO / file).read_text().splitlines()) > 400]
    assert not too_long
