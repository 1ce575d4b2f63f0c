"""Two servers of KeepKV behind SGLang's router (smg, of the dev extra), started once by examples/router.sh."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.client import STRICT, flush
from tests.support.examples import EXAMPLES, Fleet

TOOLS = f"--tool-call-parser qwen25 --chat-template {EXAMPLES / 'chatml_tools.jinja'}"
BIN = Path(sys.executable).parent  # the script calls `python` and `smg`


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _started_by_another(port: int) -> ServerProcess:
    """Only its calls are used: the script starts and ends it."""
    server = ServerProcess()
    server.port, server.base_url = port, f"http://127.0.0.1:{port}"
    return server


@pytest.fixture(scope="package")
def fleet(model_path: Path) -> Iterator[Fleet]:
    metrics, *ports = _free_ports(3)
    env = {
        **STRICT,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PORTS": " ".join(map(str, ports)),
        "SERVER_FLAGS": f"--keepkv-budget 0.2 --max-total-tokens 8000 {TOOLS}",
    }
    command = ("bash", EXAMPLES / "router.sh", model_path)
    flags = ["--prometheus-port", str(metrics), "--worker-startup-check-interval", "1"]
    with ServerProcess(flags, command=command, env=env, health_path="/readiness", timeout_s=600) as router:
        deadline = time.monotonic() + 300
        while router.get_json("/readiness")[1]["healthy_workers"] < 2:  # ready is said of the first
            assert time.monotonic() < deadline, router.log_lines()
            time.sleep(0.2)
        servers = [_started_by_another(port) for port in ports]
        yield Fleet(router, servers)
        for server in servers:
            flush(server)
