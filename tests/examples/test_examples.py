"""Every file of examples/ runs as it says: the HTTP ones share one server, the engine starts its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepkv_sglang.settings.config import OPTIONS
from keepkv_sglang.start.flags import flag_name
from keepkv_sglang.tools.places import REPO
from keepkv_sglang.tools.server_process import ServerProcess

EXAMPLES = REPO / "examples"


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[ServerProcess]:
    flags = ["--max-total-tokens", "8000", "--enable-keepkv", "--keepkv-budget", "0.2"]
    with ServerProcess(["--model-path", model_path, *flags], timeout_s=600) as running:
        yield running


def run_example(name: str, *arguments: str | Path) -> tuple[str, list[dict[str, Any]]]:
    """(stdout, every meta_info["keepkv"] that the example printed)."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    infos = re.findall(r"\bkeepkv (\{.*\})$", done.stdout, re.MULTILINE)
    return done.stdout, [json.loads(info) for info in infos]


@pytest.mark.server
def test_agent(server: ServerProcess) -> None:
    out, infos = run_example(
        "agent_openai.py",
        "--base-url",
        server.base_url,
        "--turns",
        "3",
        "--max-tokens",
        "12",
        "--budget",
        "0.25",
    )
    assert [info["budget"] for info in infos] == [0.25] * 3
    assert out.count("  reply: ") == 3 and out.count("  tool:  ") == 2
    assert infos[2]["logical_tokens"] > infos[1]["logical_tokens"] > infos[0]["logical_tokens"]
    assert infos[1]["compressions"] >= 1  # the first tool result came with it
    assert infos[2]["cached_compressed_tokens"] > 0
    assert infos[2]["slots_held"] < infos[2]["logical_tokens"]


@pytest.mark.server
def test_frontend_program(server: ServerProcess) -> None:
    out, infos = run_example("frontend_program.py", "--base-url", server.base_url, "--max-tokens", "8")
    assert len(infos) == 3 and out.count("?") >= 3
    # The shared prefix was compressed once, when fork sent it ahead; every branch found it.
    assert all(info["cached_compressed_tokens"] > 0 for info in infos), infos
    assert all(info["slots_held"] < info["logical_tokens"] for info in infos)


@pytest.mark.server
def test_offline_engine(model_path: Path) -> None:
    _, infos = run_example("offline_engine.py", "--model", model_path, "--max-tokens", "8")
    default, off, half, slots = infos
    assert default["budget"] == 0.2 and default["slots_held"] < 0.4 * default["logical_tokens"]
    assert off["enabled"] is False and off["slots_held"] == off["logical_tokens"] and off["compressions"] == 0
    assert half["budget"] == 0.5 and default["slots_held"] < half["slots_held"] < half["logical_tokens"]
    assert slots["budget"] == 64 and slots["slots_held"] <= 64 + 8 + 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_server_is_valid_shell_and_names_flags_that_exist(tmp_path: Path) -> None:
    script = EXAMPLES / "gpu_server.sh"
    subprocess.run(["bash", "-n", script], check=True)
    known = {"--" + flag_name(field).replace("_", "-") for field in OPTIONS}
    used = set(re.findall(r"--(?:enable-)?keepkv[a-z-]*", script.read_text()))
    assert "--enable-keepkv" in used and used <= known, used - known

    # A python that only prints its arguments: what each mode would start.
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "[${CUDA_VISIBLE_DEVICES-unset}]" "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True)

    plain, keepkv = start("plain", "some model"), start("keepkv", "some model", "31234")
    assert plain.stdout.startswith("[0] -m sglang.launch_server --model-path some model ")
    assert "keepkv" not in plain.stdout and "--port 30000" in plain.stdout
    assert keepkv.stdout.startswith("[0] -m sglang.launch_server") and "--port 31234" in keepkv.stdout
    assert "--enable-keepkv --keepkv-budget 0.2 --keepkv-merge attention_matching" in keepkv.stdout
    assert start().returncode == start("gpu", "model").returncode == 2


def test_every_example_is_listed_in_the_readme() -> None:
    listed = set(re.findall(r"^\| `([^`]+)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert listed == files | {
        f"{path.name}/" for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
