"""ServerProcess: progress, log lines when a server dies, timeouts, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keepkv_sglang.tools.server_process import ServerError, ServerProcess, group_members

SERVER = """
import argparse, http.server, json, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--host"); parser.add_argument("--port", type=int)
parser.add_argument("--child", action="store_true"); parser.add_argument("--slow", type=float, default=0)
args = parser.parse_args()
if args.child:  # one that ignores SIGTERM, like a worker in a long kernel
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)"
    command = [sys.executable, "-c", code + "; time.sleep(600)"]
    subprocess.Popen(command, stdout=subprocess.PIPE).stdout.readline()
print("[2026-01-02 03:04:05] Loading weights", flush=True)
time.sleep(args.slow)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, b'{"path": "%s"}' % self.path.encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(400 if body.get("bad") else 200, json.dumps(body).encode())
    def answer(self, status, body):
        self.send_response(status); self.end_headers(); self.wfile.write(body)
http.server.HTTPServer((args.host, args.port), Handler).serve_forever()
"""
COMMAND = (sys.executable, "-c", SERVER)
DYING = """
import sys
print("[2026-01-02 03:04:05] server_args=ServerArgs(" + "x" * 5000 + ")")
print("UserWarning: something is old")
print()
print("KeepKV: out of luck")
sys.exit(3)
"""


def _gone(group: int) -> bool:
    for _ in range(100):
        if not group_members(group):
            return True
        time.sleep(0.1)
    return False


def test_json_calls_and_a_log_that_is_removed_after_success() -> None:
    with ServerProcess(command=COMMAND) as server:
        assert server.base_url == f"http://127.0.0.1:{server.port}"
        assert server.get_json("/health") == (200, {"path": "/health"})
        assert server.get_json("/other") == (404, {"path": "/other"})
        assert server.post_json("/x", {"a": 1}) == (200, {"a": 1})
        assert server.post_json("/x", {"bad": True}) == (400, {"bad": True})
        assert server.log_path is not None and server.log_path.exists()
        group = server.process.pid
    assert not group_members(group) and not server.log_path.exists()


def test_a_dying_server_is_reported_with_its_meaningful_last_lines(tmp_path: Path) -> None:
    server = ServerProcess(command=(sys.executable, "-c", DYING), log_path=tmp_path / "log")
    with pytest.raises(ServerError) as failure, server:
        pass
    message = str(failure.value)
    assert "exit status 3" in message and str(tmp_path / "log") in message
    assert message.endswith("Its last lines:\n  KeepKV: out of luck")


def test_a_silent_server_times_out_with_progress_and_is_ended(tmp_path: Path) -> None:
    lines: list[str] = []
    server = ServerProcess(
        ["--slow", "60"], command=COMMAND, timeout_s=5.5, say=lines.append, log_path=tmp_path / "log"
    )
    with pytest.raises(ServerError, match=r"did not answer /health within"), server:
        pass
    assert lines == ["5 s: Loading weights"]
    assert not group_members(server.process.pid)


def test_children_that_ignore_sigterm_are_killed() -> None:
    server = ServerProcess(["--child"], command=COMMAND, grace_s=0.5)
    with pytest.raises(RuntimeError, match="test"), server:
        group = server.process.pid
        assert len(group_members(group)) == 2
        raise RuntimeError("test")
    assert not group_members(group)
    assert server.log_path is not None and server.log_path.exists()  # kept: something went wrong
    server.log_path.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_owner_is_interrupted_or_killed(number: int, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import time
from keepkv_sglang.tools.server_process import ServerProcess
with ServerProcess(["--child"], command={COMMAND!r}, grace_s=0.5, log_path=Path("log")) as server:
    print(server.process.pid, flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        # `make test &` from a script starts everything with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert owner.stdout is not None
    try:
        group = int(owner.stdout.readline())
        owner.send_signal(number)
        owner.wait(30)
        assert _gone(group)
    finally:
        owner.kill()
        owner.stdout.close()
