"""A server of which a process is killed while it works: nothing of it stays, and a new one serves at the same port."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from keepkv_sglang.tools.server_process import ServerProcess, group_members
from tests.soak.control import started
from tests.support.client import STRICT, body, generate, tokens

pytestmark = [pytest.mark.server, pytest.mark.soak]
FLAGS = ("--enable-keepkv", "--keepkv-host-ratio", "2", "--max-total-tokens", "1500", "--chunked-prefill-size", "128")
PATIENCE_S = 150  # SGLang's watchdog writes a crash dump, and waits 60 s for one of CUDA's, also where there is none
SGLANGS = re.compile(r"tmp\w{8}|sglang_loads_\w+\.shm|sem\.mp-\w{8}")
"""What SGLang itself leaves of any server, also of one that ends well: names of sockets, and a page for its load."""


def member(server: ServerProcess, named: str) -> int:
    """The process of this name; "" is the one that answers clients."""
    if not named:
        return server.process.pid
    found = [pid for pid in group_members(server.process.pid)
             if named.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip
    assert len(found) == 1, (named, found)
    return found[0]


def shared_memory(server: ServerProcess) -> set[str]:
    """Files of /dev/shm that its processes have mapped; other servers have theirs."""
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in group_members(server.process.pid)]
    return {name for text in maps for name in re.findall(r"/dev/shm/(\S+)", text)}


def bind(port: int) -> None:
    """OSError where somebody listens."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does: closed connections linger
        listener.bind(("127.0.0.1", port))
        listener.listen()


@pytest.mark.parametrize("named", ["scheduler", "detokenizer", ""], ids=["scheduler", "detokenizer", "server"])
def test_nothing_stays_and_the_port_serves_again(model_path, tmp_path, named):
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    def server(port: int | None) -> ServerProcess:
        return ServerProcess(
            ["--model-path", model_path, *FLAGS], env={**STRICT, "TMPDIR": str(temporary)},
            log_path=tmp_path / "server.log", port=port,
        )  # fmt: skip

    first = server(None)
    with first:
        quiet = generate(first, tokens(300, 1), 4)

        def send(seed: int) -> None:
            with suppress(OSError, HTTPException):  # it is killed
                first.post_json("/generate", body(tokens(700, seed), 400), timeout_s=60)

        clients = [started(lambda seed=seed: send(seed)) for seed in range(3)]
        while not first.get_json("/server_info")[1]["internal_states"][0]["keepkv"]["active_rows"]:
            time.sleep(0.1)
        shared = shared_memory(first)
        os.kill(member(first, named), signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while left := group_members(first.process.pid):
            first.process.poll()
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
            time.sleep(0.2)
        for client in clients:
            client.join(PATIENCE_S)
            assert not client.is_alive(), "a client waits for a server that is gone"
    bind(first.port)
    left = {name for name in shared if Path("/dev/shm", name).exists()}
    left |= {path.name for path in temporary.iterdir() if not path.is_dir()}
    assert not [name for name in left if not SGLANGS.fullmatch(name)], left
    with server(first.port) as again:
        assert again.port == first.port
        answer = generate(again, tokens(300, 1), 4)
        assert (answer.ids, answer.logprobs) == (quiet.ids, quiet.logprobs)
        shared |= shared_memory(again)
    for name in shared:
        Path("/dev/shm", name).unlink(missing_ok=True)
