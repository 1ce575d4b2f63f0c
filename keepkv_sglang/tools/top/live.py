"""The view that renews itself, until q is pressed."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.live import Live

from keepkv_sglang.tools.remote import OffError, Remote, UnreachableError
from keepkv_sglang.tools.top.reading import Reading, read
from keepkv_sglang.tools.top.screen import view

RATES_OVER_S = 60.0


def watch(server: Remote, first: Reading, every_s: float, console: Console) -> None:
    """Looks every so many seconds. It goes on when the server is away for a while; KeyboardInterrupt ends it too."""
    past = deque([first])
    with _keys() as pressed, Live(view(first, note=_note()), console=console, screen=True, auto_refresh=False) as live:
        while pressed(every_s) != "q":
            live.update(_next(server, past), refresh=True)


def _next(server: Remote, past: deque[Reading]) -> RenderableType:
    """Looks again; past: the readings of the last RATES_OVER_S, the oldest first."""
    last = past[-1]
    try:
        past.append(read(server))
    except (UnreachableError, OffError) as error:
        return view(last, note=f"{time.monotonic() - last.when:.0f} s old: {error}")
    now = past[-1]
    if now.counters["hook_seconds"] < last.counters["hook_seconds"]:  # another process: the server was started again
        past.clear()
        past.append(now)
    while now.when - past[0].when > RATES_OVER_S:
        past.popleft()
    return view(now, past[0], _note())


def _note() -> str:
    return f"{time.strftime('%H:%M:%S')}  totals since the server began, rates over {RATES_OVER_S:.0f} s; q ends"


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str | None]]:
    """A function that waits so many seconds for a key. Where stdin is no terminal it only waits."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(seconds: float) -> str | None:
        ready, _, _ = select.select([fd], [], [], seconds)
        return os.read(fd, 1).decode(errors="replace") if ready else None

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
