"""A server in its own process group: started, waited for, and gone when the `with` block ends.

Used by `keepkv demo`, the tests of examples/ and tests/server. Standard library only; Linux (it reads /proc).

    with ServerProcess(["--model-path", model, "--enable-keepkv"]) as server:
        status, answer = server.post_json("/generate", {"text": "Hello"})

Nothing stays behind: not after an exception or Ctrl-C, nor when this very process dies without a word
(kill -9, pytest-timeout's os._exit): a watcher process holds one end of a pipe and kills the group when the
pipe closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

LAUNCH_SERVER = (sys.executable, "-m", "sglang.launch_server")
_WATCHER = 'trap "" INT TERM HUP; cat >/dev/null; kill -s KILL -- "-$1" 2>/dev/null'
_TIMESTAMP = re.compile(r"^\[\d{4}-\d\d-\d\d[^\]]*\]\s*")
_NOISE = re.compile(
    r"server_args=|ServerArgs\(|warning|warnings\.warn|^\s*[\^~|]*\s*$|it/s\]|GET /|RLIMIT_NOFILE|^  Example:"
    r"|Ignore import error|Cannot detect CUDA",
    re.IGNORECASE,
)


class ServerError(RuntimeError):
    """The server died or stayed silent; the message ends with the last lines of its log."""


class ServerProcess:
    """Context manager around one server. Attributes: base_url, port, log_path, process, seconds_to_start.

    arguments: appended to `command`, then ``--host 127.0.0.1 --port PORT``. port: None for a free one.
    log_path: where stdout and stderr go; by default a temporary file that is removed when all went well.
    timeout_s: seconds until ``health_path`` must answer 200. grace_s: seconds between SIGTERM and SIGKILL.
    say: called with one line of progress every few seconds while the server starts.
    env: variables set on top of this process's.

    Raises ServerError on entry when the server dies or does not answer in time.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]] = (),
        *,
        command: Sequence[str | os.PathLike[str]] = LAUNCH_SERVER,
        log_path: Path | None = None,
        timeout_s: float = 300,
        grace_s: float = 10,
        health_path: str = "/health",
        say: Callable[[str], None] | None = None,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = _free_port() if port is None else port
        self.base_url = f"http://127.0.0.1:{self.port}"
        parts = [*command, *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        self.command = [os.fspath(part) for part in parts]
        self.log_path = log_path
        self.timeout_s, self.grace_s, self.health_path = timeout_s, grace_s, health_path
        self.seconds_to_start = 0.0
        self._say = say or (lambda line: None)
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._own_log = log_path is None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server's main process; its pid is also the process group."""
        assert self._process is not None, "the server is not started: use `with ServerProcess(...)`"
        return self._process

    def __enter__(self) -> ServerProcess:
        try:
            self._start()
            self._wait_until_healthy()
        except BaseException:  # Ctrl-C included
            self.stop()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._own_log and error is None and self.log_path is not None:
            self.log_path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends the whole process group: SIGTERM to the server, SIGKILL for what is left. Safe to call twice.

        Only the server's main process gets the SIGTERM: SGLang ends its workers itself, and takes a worker
        that ends on its own for a crash, which costs it five seconds of diagnostics.
        """
        if self._process is None:
            return
        group = self._process.pid
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(self.grace_s)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self._wait_until_gone(group, 10)
        except BaseException:  # a second Ctrl-C while waiting: no more patience
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            raise
        finally:
            if self._watcher is not None:
                self._watcher.kill()  # before its pipe closes: the group's number may be reused one day
                self._watcher.communicate()
                self._watcher = None

    def get_json(self, path: str, timeout_s: float = 60) -> tuple[int, Any]:
        """(HTTP status, decoded body) of a GET. A body that is not JSON comes back as text."""
        return self._call(urllib.request.Request(self.base_url + path), timeout_s)

    def post_json(self, path: str, body: Any, timeout_s: float = 600) -> tuple[int, Any]:
        """(HTTP status, decoded body) of a POST of `body` as JSON. Error statuses do not raise."""
        return self.post_text(path, json.dumps(body), timeout_s)

    def post_text(self, path: str, body: str, timeout_s: float = 600) -> tuple[int, Any]:
        """The same of a text that says it is JSON."""
        headers = {"Content-Type": "application/json"}
        return self._call(urllib.request.Request(self.base_url + path, body.encode(), headers), timeout_s)

    def log_lines(self, count: int = 15) -> list[str]:
        """The last lines of the log that say something: no dump of all flags, no warnings, no blank lines."""
        text = self.log_path.read_text(errors="replace") if self.log_path else ""
        lines = [line.rstrip()[:400] for line in text.splitlines() if not _NOISE.search(line)]
        return lines[-count:]

    def _start(self) -> None:
        if self.log_path is None:
            handle, name = tempfile.mkstemp(prefix="keepkv-server-", suffix=".log")
            os.close(handle)
            self.log_path = Path(name)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,  # a group of its own: Ctrl-C in the terminal reaches only us
            )
        watch = ["/bin/sh", "-c", _WATCHER, "keepkv-watcher", str(self._process.pid)]
        self._watcher = subprocess.Popen(
            watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def _wait_until_healthy(self) -> None:
        start = time.monotonic()
        next_line_s, last = 5.0, ""
        while not self._healthy():
            elapsed = time.monotonic() - start
            if self.process.poll() is not None:
                self._fail(f"the server ended with exit status {self.process.returncode} while starting")
            if elapsed > self.timeout_s:
                self._fail(f"the server did not answer {self.health_path} within {self.timeout_s:.0f} s")
            if elapsed >= next_line_s:
                line = _TIMESTAMP.sub("", (self.log_lines(1) or ["importing SGLang"])[0])[:90]
                self._say(f"{elapsed:.0f} s: {'...' if line == last else line}")
                next_line_s, last = elapsed + 5, line
            time.sleep(0.2)
        self.seconds_to_start = time.monotonic() - start

    def _healthy(self) -> bool:
        request = urllib.request.Request(self.base_url + self.health_path)
        try:
            return self._call(request, timeout_s=5)[0] == 200
        except OSError:  # refused, reset or timed out: not yet
            return False

    def _fail(self, what: str) -> None:
        lines = "\n".join("  " + line for line in self.log_lines())
        raise ServerError(f"{what} (log: {self.log_path}). Its last lines:\n{lines}")

    def _call(self, request: urllib.request.Request, timeout_s: float) -> tuple[int, Any]:
        try:
            with _opener.open(request, timeout=timeout_s) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode(errors="replace")

    def _wait_until_gone(self, group: int, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while group_members(group) and time.monotonic() < deadline:
            self.process.poll()  # reaps the leader
            time.sleep(0.05)
        self.process.poll()


def group_members(group: int) -> list[int]:
    """Processes of a process group that still run. Zombies do not count: not every container reaps them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (any text, brackets too) state parent group ...
            state, _parent, its_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # gone while we looked
        if int(its_group) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# A proxy in the environment must not see calls to 127.0.0.1.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
