"""Runs a file of examples/ as a user does, and reads what it printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.places import REPO
from keepkv_sglang.tools.server_process import ServerProcess

EXAMPLES = REPO / "examples"
CALL = re.compile(r"^  tool: (\w+) (\{.*\})$", re.MULTILINE)
ARGUMENTS: dict[str, Any] = {
    "orders": lambda days: 1 <= days <= 7 and isinstance(days, int),
    "stock": lambda part: part in PARTS,
    "suppliers": lambda part: part in PARTS,
}
PARTS = ("brake pad", "chain", "tube 28", "cassette")


@dataclass
class Fleet:
    """What examples/router.sh started (tests/examples/conftest.py)."""

    router: ServerProcess
    servers: list[ServerProcess]


def run_example(name: str, *arguments: str | Path) -> tuple[str, list[dict[str, Any]]]:
    """(stdout, every meta_info["keepkv"] that the example printed)."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    infos = re.findall(r"\bkeepkv (\{.*\})$", done.stdout, re.MULTILINE)
    return done.stdout, [json.loads(info) for info in infos]


def calls(out: str) -> list[str]:
    """Names of the tools that an agent called. Asserts that SGLang made calls as the tools' schemas want them."""
    made = [(name, json.loads(arguments)) for name, arguments in CALL.findall(out)]
    assert all(ARGUMENTS[name](**arguments) for name, arguments in made), made
    return [name for name, _ in made]
