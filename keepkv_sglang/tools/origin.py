"""Where a report's numbers come from: without it they are worth nothing."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import date

from keepkv_sglang.tools.places import REPO


def origin(*about: str) -> str:
    """The keepkv command that runs, commit, date and machine, in one line; `about`: further things of the machine."""
    machine = ", ".join([platform.machine(), f"{os.cpu_count()} cores", *about])
    return f"`keepkv {shlex.join(sys.argv[1:])}`; commit {commit()}, {date.today()}, {machine}."


def commit() -> str:
    """The checkout's, `-dirty` when it has changes; "no git" outside of one."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git"
