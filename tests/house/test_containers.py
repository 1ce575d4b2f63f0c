"""The Containerfiles, which are never built here: hadolint reads them, and what they name is there."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from keepkv_sglang.tools.places import REPO

FILES = ("Containerfile", "Containerfile.cuda")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> list[list[str]]:
    """[instruction, word, ...] of each, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (REPO / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def first(name: str, instruction: str) -> list[list[str]]:
    return [words[1:] for words in instructions(name) if words[0] == instruction]


@pytest.mark.parametrize("name", FILES)
def test_hadolint(name):
    command = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([command, name], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_makes_the_whole_wheel(name):
    (root, *folders) = first(name, "COPY")
    assert set(root[:-1]) == {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} and root[-1] == "./"
    assert sorted(folders) == [[f, f] for f in ("keepkv_sglang", "kernels", "radix")], (
        "symlinks lead from one to others"
    )
    for path in {word for words in (root[:-1], *folders) for word in words}:
        assert (REPO / path).exists()
    ignored = [line for line in (REPO / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*" and {line[1:] for line in ignored if line[0] == "!"} == {
        *root[:-1],
        *(f for f, _ in folders),
    }
    assert fnmatch.fnmatch("kernels/__pycache__", ignored[-1])


@pytest.mark.parametrize("name", FILES)
def test_python_and_cuda_are_those_of_the_package(name):
    low = PROJECT["requires-python"].removeprefix(">=")
    known = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    images = [words[0] for words in first(name, "FROM")]
    versions = re.findall(r"python:(3\.\d+)-", " ".join(images)) + re.findall(
        r"Python is (3\.\d+)", (REPO / name).read_text()
    )
    assert len(versions) == 2 and len(set(versions)) == 1, "the wheel is made by the Python that installs it"
    assert low in known and set(versions) <= known
    for toolkit in re.findall(r"cuda:(\d+)\.", " ".join(images)):
        assert f"flashinfer_python[cu{toolkit}]" in " ".join(metadata.requires("sglang") or ())
        assert f"CUDA {toolkit}" in (REPO / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_the_server_is_no_root_and_is_asked_where_it_listens(name):
    assert first(name, "USER")[-1][0].isdigit() and first(name, "USER")[-1] != ["0"]
    (entry,), (exposed,) = first(name, "ENTRYPOINT"), first(name, "EXPOSE")
    port = exposed[0]
    assert f"--port, {port}" in " ".join(entry) and f":{port}/health" in " ".join(first(name, "HEALTHCHECK")[0])
    (cache,) = first(name, "VOLUME")
    assert f"KEEPKV_CACHE={cache[0]}" in first(name, "ENV")[-1]
