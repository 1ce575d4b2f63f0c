"""A program in a pseudo-terminal of 80 columns, and what stands on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from types import TracebackType

ROWS, COLUMNS = 24, 80
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_HOME = "\x1b[H"


class Terminal:
    """Context manager. screen: the last whole picture, of a program that draws each one from the upper left corner."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._written = ""

    def __enter__(self) -> Terminal:
        self._fd, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        env = {**os.environ, "TERM": "xterm-256color"}
        self._process = subprocess.Popen(
            self._command, stdin=inside, stdout=inside, stderr=inside, env=env, start_new_session=True
        )
        os.close(inside)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._fd)

    @property
    def screen(self) -> str:
        pictures = self._written.split(_HOME)
        return _ESCAPE.sub("", pictures[-1]).replace("\r\n", "\n")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Until it stands on the screen."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < deadline and self._process.poll() is None, self._written[-4000:]
            self._read(0.1)

    def type(self, keys: str, seconds: float = 20) -> int:
        """Sends them and waits for the program's end; its exit code."""
        os.write(self._fd, keys.encode())
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            assert time.monotonic() < deadline, "it did not end"
            self._read(0.1)
        return self._process.returncode

    def _read(self, seconds: float) -> None:
        ready, _, _ = select.select([self._fd], [], [], seconds)
        if ready:
            with contextlib.suppress(OSError):  # the program is gone
                self._written += os.read(self._fd, 1 << 16).decode(errors="replace")
