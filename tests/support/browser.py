"""A headless Chromium for tests of pages; without one they are skipped, and the reason says what to install."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def chromium() -> str | None:
    """$KEEPKV_CHROMIUM, or the first of NAMES on the path."""
    return os.environ.get("KEEPKV_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's browser. Skips the test where no Chromium is installed, which pip cannot bring."""
    path = chromium()
    if path is None:
        pytest.skip(f"no Chromium: install one ({', '.join(NAMES)}) or name it in KEEPKV_CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root in a container
        try:
            yield started
        finally:
            started.close()


def opened(started: Any, page: Path, **context: Any) -> tuple[Any, list[str]]:
    """(the page once it is drawn, what it complained of or asked the network for so far and later)."""
    tab, complaints = started.new_context(**context).new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else complaints.append(asked.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    return tab, complaints
